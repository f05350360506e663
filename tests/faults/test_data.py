"""Faults of the data: bad rows, dead workers, files that change, text that ends."""

import json
from collections.abc import Callable
from pathlib import Path

import deadly_tasks
import pytest

from interlace.trainer.config.schema import DataSection
from interlace.trainer.data import prepare as prepare_module
from interlace.trainer.data.prepare import prepare
from interlace.trainer.data.shards import PreparedCorpus
from interlace.trainer.errors import DataError

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


def test_g2_workers_that_are_killed_again_and_again_end_the_work_in_words(
    deadly: Callable[[str], PreparedCorpus], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"4 times a process that tokenises was killed.*workers=1"):
        deadly("2:before:always")
    left = [path.name for path in (tmp_path / "prepared-2-before" / "prepared").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []
