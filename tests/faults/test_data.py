"""Faults of the data: bad rows, dead workers, files that change, text that ends."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deadly_tasks
import numpy as np
import pytest
from tiny_run import config_of, train_here

from interlace.trainer.assembly import open_run
from interlace.trainer.batches import StepBatches
from interlace.trainer.config.schema import DataSection, SourceSection
from interlace.trainer.data import prepare as prepare_module
from interlace.trainer.data.prepare import find_prepared, prepare
from interlace.trainer.data.rows import TrainingRows
from interlace.trainer.data.shards import PreparedCorpus, TokenStream
from interlace.trainer.errors import DataError
from interlace.trainer.loop import finished_steps
from interlace.trainer.world import World

PARTS = 4
"""Files, and tasks, of the corpus."""


def section(folder: Path, source: str, **more: object) -> DataSection:
    tables = {"source": source, "prepared_dir": str(folder / "prepared"), "sequence_length": 32}
    return DataSection.model_validate({**tables, **more})


def quietly(data: DataSection) -> PreparedCorpus:
    return prepare(data, announce=lambda _: None)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus of several files, each of which is a task of its own; its glob."""
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1)
    for part in range(PARTS):
        rows = [{"text": f"document {part}/{n} " + "and words " * n} for n in range(40)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return f"{tmp_path}/*.jsonl"


@pytest.fixture
def deadly(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], PreparedCorpus]:
    """Prepare the corpus with workers of which one is killed as told, and check what is left."""

    def prepared(told: str) -> PreparedCorpus:
        number, when, *always = told.split(":")
        marks = tmp_path / f"marks-{number}-{when}"
        marks.mkdir()
        monkeypatch.setenv(deadly_tasks.PLAN, ":".join([number, when, str(marks), *always]))
        monkeypatch.setattr(prepare_module, "run_task", deadly_tasks.run_task)
        where = tmp_path / f"prepared-{number}-{when}"
        try:
            return quietly(section(where, parts, workers=2))
        finally:
            assert [mark.name for mark in marks.iterdir()] == [number], "nobody was killed"

    return prepared


def undisturbed(parts: str, tmp_path: Path) -> PreparedCorpus:
    """The corpus as one process makes it."""
    return quietly(section(tmp_path / "undisturbed", parts, workers=1))


def assert_same(corpus: PreparedCorpus, expected: PreparedCorpus) -> None:
    """Nothing is lost, repeated or moved, and nothing else lies in the folder."""
    corpus.verify()
    assert corpus.digest == expected.digest
    names = [
        sorted(str(p.relative_to(c.folder)) for c in [each] for p in c.folder.rglob("*"))
        for each in (corpus, expected)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "told",
    [
        "1:within",
        *(
            pytest.param(f"{number}:{when}", marks=pytest.mark.faults)
            for number in range(PARTS)
            for when in ("before", "within", "behind")
            if (number, when) != (1, "within")
        ),
    ],
)
def test_g2_a_worker_that_is_killed_loses_and_repeats_nothing(
    told: str, deadly: Callable[[str], PreparedCorpus], parts: str, tmp_path: Path
) -> None:
    corpus = deadly(told)
    assert_same(corpus, undisturbed(parts, tmp_path))


@pytest.mark.faults
def test_g2_workers_that_are_killed_again_and_again_end_the_work_in_words(
    deadly: Callable[[str], PreparedCorpus], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"4 times a process that tokenises was killed.*workers=1"):
        deadly("2:before:always")
    left = [path.name for path in (tmp_path / "prepared-2-before" / "prepared").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


GOOD_ROWS = [{"text": f"document {n} " + "words and more words " * (n % 7 + 1)} for n in range(300)]

BAD_LINES = (
    b'{"text": "unfinished',
    b'{"text": "not \xff UTF-8"}',
    b'{"text": 5}',
    b'{"text": NaN}',
    b'{"text": null}',
    b'{"text": ["a list"]}',
    b'{"text": ""}',
    b'{"body": "another field"}',
    b'["no", "object"]',
    b'{"text": "\\ud800"}',
    b'{"text": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b"\0\0\0\0",
    b'{"text": "huge' + b" and huge" * 500_000,
)
"""One of each way in which a row can be bad."""


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[str, str]:
    """Globs of a clean corpus and of the same with bad rows strewn in."""
    lines = [json.dumps(row).encode() for row in GOOD_ROWS]
    for name in ("clean", "spoilt"):
        folder = tmp_path / name
        folder.mkdir()
        for part in range(3):
            own = lines[part * 100 : part * 100 + 100]
            if name == "spoilt":
                for number, bad in enumerate(BAD_LINES[part::3]):
                    own.insert(7 * number + part, bad)
            (folder / f"{part}.jsonl").write_bytes(b"\n".join(own) + b"\n")
    return f"{tmp_path}/clean/*.jsonl", f"{tmp_path}/spoilt/*.jsonl"


def contents_of(corpus: PreparedCorpus) -> list[tuple[str, str]]:
    """Return name and digest of every shard."""
    [source] = corpus.index.sources
    return [(s.file, s.sha256) for split in (source.train, source.validation) for s in split.shards]


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.faults)])
def test_g1_bad_rows_are_left_out_and_listed_and_the_rest_is_what_it_would_be_without_them(
    workers: int, spoilt: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1)
    clean, dirty = spoilt
    expected = quietly(section(tmp_path / "a", clean, workers=1))
    skipped = section(
        tmp_path / "b", dirty, workers=workers, on_bad_row="skip", bad_row_budget=0.05
    )
    corpus = quietly(skipped)
    assert contents_of(corpus) == contents_of(expected)
    listed = [
        json.loads(line)
        for line in (corpus.folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(listed) == corpus.index.bad_rows == len(BAD_LINES)
    for bad in listed:
        line = Path(bad["file"]).read_bytes().split(b"\n")[bad["row"] - 1]
        assert line in BAD_LINES, bad
        assert bad["reason"]
        assert len(bad["excerpt"]) <= 200
    assert {(bad["file"], bad["row"]) for bad in listed} == {
        (str(path), row)
        for path in sorted((tmp_path / "spoilt").iterdir())
        for row, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line in BAD_LINES
    }


def test_g1_more_bad_rows_than_the_budget_stop_the_work(
    spoilt: tuple[str, str], tmp_path: Path
) -> None:
    data = section(tmp_path / "b", spoilt[1], workers=1, on_bad_row="skip", bad_row_budget=0.04)
    with pytest.raises(DataError, match=r"14 of 314 rows are bad, more than data\.bad_row_budget"):
        quietly(data)


def changed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3)
        byte = file.read(1)
        file.seek(3)
        file.write(bytes([byte[0] ^ 1]))


def replaced(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    copy.replace(path)


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("meddle", [changed, replaced, shortened, removed])
def test_g3_a_shard_that_changes_while_a_run_reads_it_is_not_read_on(
    meddle: Callable[[Path], None], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 4000, encoding="utf-8")
    corpus = quietly(section(tmp_path, str(text)))
    split = corpus.index.sources[0].train
    stream = TokenStream(corpus, split)
    before = stream.read(0, 33)
    np.testing.assert_array_equal(stream.read(0, 33), before)
    path = corpus.folder / split.shards[0].file
    meddle(path)
    with pytest.raises(DataError) as caught:
        stream.read(0, 33)
    assert str(caught.value).startswith(f"corpus shard {path}: was changed while the run reads it")


def test_g3_a_run_whose_corpus_changes_stops_before_it_learns_from_it_and_goes_on_once_mended(
    tiny: Sequence[str], tmp_path: Path, losses_of: Callable[[Path], list[str]]
) -> None:
    run, straight, prepared = (tmp_path / name for name in ("run", "straight", "prepared"))
    words = (*tiny, f"data.prepared_dir={prepared}", "train.steps=10")
    train_here(words, straight)
    corpus = find_prepared(config_of(words, run).data)
    assert corpus is not None
    path = corpus.folder / corpus.index.sources[0].train.shards[0].file
    sound = path.read_bytes()
    refusal = pytest.raises(DataError, match="was changed while the run reads it")
    with refusal, open_run(config_of(words, run), World()) as begun:
        for step in finished_steps(begun):
            if step == 6:
                changed(path)
    assert step == 6
    with pytest.raises(DataError, match="is corrupt"):
        train_here(words, run)
    path.write_bytes(sound)
    train_here(words, run)
    assert losses_of(run) == losses_of(straight)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_g4_all_ranks_have_equally_many_passes_and_every_row_once(ranks: int) -> None:
    for microbatch in (1, 2):
        for count in range(1, 40):
            plan = SimpleNamespace(
                microbatch_rows=microbatch, accumulation=12 // ranks // microbatch
            )
            rows = SimpleNamespace(count=count, batch=lambda a, b: np.zeros((b - a, 3), np.int64))
            passes: list[int] = []
            counted = 0
            trained: list[int] = []
            for rank in range(ranks):
                batches = batches_of(plan, rows, World(rank=rank, size=ranks))
                own = list(batches.of_validation())
                passes.append(len(own))
                counted += sum(number for _, number in own)
                trained += [row for part in batches.rows_of_step(0) for row in part]
            assert len(set(passes)) == 1, (microbatch, count)
            assert counted == count
            if 12 % (ranks * microbatch) == 0:
                assert sorted(trained) == list(range(12))


def batches_of(plan: Any, validation: Any, world: World) -> StepBatches:
    training: Any = None
    return StepBatches(training, validation, plan, world, 256, False, 1.0)


def test_g4_a_run_longer_than_its_text_goes_through_it_again_and_resumes_exactly(
    tiny: Sequence[str], tmp_path: Path, losses_of: Callable[[Path], list[str]]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer\n" for n in range(130)), encoding="utf-8")
    run, straight = tmp_path / "run", tmp_path / "straight"
    words = (*tiny, f"data.source={text}", f"data.prepared_dir={tmp_path / 'prepared'}")
    words = (*words, "train.validation_tokens=64")
    train_here(words, straight, "train.steps=12", "optimizer.schedule=constant")
    config = config_of(words, run, "train.steps=12", "optimizer.schedule=constant")
    with open_run(config, World()) as begun:
        assert begun.plan.epochs is not None
        assert begun.plan.epochs > 1.2
        for step in finished_steps(begun):
            if step == 8:
                break
    train_here(words, run, "train.steps=12", "optimizer.schedule=constant")
    assert losses_of(run) == losses_of(straight)


@pytest.mark.faults
def test_g5_the_order_is_the_same_from_each_of_50_points_of_resumption(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    """Three sources of unequal size and weight, several epochs of the smallest."""
    sources = []
    for number, lines in enumerate((300, 900, 100)):
        path = tmp_path / f"{number}.txt"
        path.write_text("".join(f"{number}/{n} of it\n" for n in range(lines)), encoding="utf-8")
        sources.append({"source": str(path), "weight": float(number + 1)})
    config = config_of(tiny, tmp_path / "run")
    data = config.data.model_copy(
        update={
            "source": [SourceSection(**s) for s in sources],
            "prepared_dir": str(tmp_path / "p"),
        }
    )
    config = config.model_copy(update={"data": data})
    corpus = quietly(data)
    size = config.train.tokens_per_step // data.sequence_length
    straight = TrainingRows(corpus, config)
    expected = [straight.batch(step, range(size)) for step in range(60)]
    for point in range(50):
        resumed = TrainingRows(corpus, config)
        for step in range(point, min(point + 10, 60)):
            np.testing.assert_array_equal(resumed.batch(step, range(size)), expected[step])
    assert len({batch.tobytes() for batch in expected}) == 60
