"""Preparation: good text in every format, bad rows by file and number, atomic and repeatable."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from interlace.trainer.config import RunConfig
from interlace.trainer.config.schema import DataSection, SourceSection, TrainSection
from interlace.trainer.data import prepare as prepare_module
from interlace.trainer.data.prepare import find_prepared, prepare
from interlace.trainer.data.rows import TrainingRows, ValidationRows, positions_of, segments_of
from interlace.trainer.data.shards import PreparedCorpus, TokenStream, read_corpus
from interlace.trainer.errors import DataError

DOCUMENTS = [f"document {n} " + "words and more words " * (n % 7 + 1) for n in range(300)]


def section(tmp_path: Path, source: str | list[SourceSection], **more: object) -> DataSection:
    return DataSection.model_validate(
        {
            "source": source,
            "prepared_dir": str(tmp_path / "prepared"),
            "sequence_length": 32,
            **more,
        }
    )


def quietly(data: DataSection) -> PreparedCorpus:
    return prepare(data, announce=lambda _: None)


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts_of(corpus: PreparedCorpus) -> list[str]:
    """Decode all documents of a byte corpus, training before validation."""
    texts: list[str] = []
    for source in corpus.index.sources:
        for split in (source.train, source.validation):
            tokens = TokenStream(corpus, split).read(0, split.tokens)
            parts = np.split(tokens, np.flatnonzero(tokens == 256))
            texts += [bytes(part[1:].astype(np.uint8)).decode() for part in parts if len(part)]
    return texts


def test_every_format_yields_the_same_documents(tmp_path: Path) -> None:
    rows: list[object] = [{"text": text} for text in DOCUMENTS]
    sources = {"jsonl": write_jsonl(tmp_path / "a.jsonl", rows)}
    sources["zipped"] = str(tmp_path / "b.jsonl.gz")
    with gzip.open(sources["zipped"], "wt", encoding="utf-8") as file:
        file.write((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    sources["parquet"] = str(tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), sources["parquet"])
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    sources["text"] = f"text:{folder}/*.txt"
    hub = tmp_path / "dataset"
    hub.mkdir()
    write_jsonl(hub / "train.jsonl", rows)
    sources["hub"] = f"hub:{hub}"
    for source in sources.values():
        corpus = quietly(section(tmp_path, source))
        assert sorted(texts_of(corpus)) == sorted(DOCUMENTS)
        assert corpus.index.sources[0].validation.documents > 0


def test_a_second_call_finds_the_work_done_and_changed_text_is_new_work(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = section(tmp_path, write_jsonl(path, [{"text": text} for text in DOCUMENTS]))
    assert find_prepared(data) is None
    first = quietly(data)
    stamp = (first.folder / "index.json").stat().st_mtime_ns
    assert quietly(data).folder == first.folder
    assert (first.folder / "index.json").stat().st_mtime_ns == stamp
    write_jsonl(path, [{"text": text} for text in DOCUMENTS[:-1]])
    assert quietly(data).folder != first.folder


def test_the_number_of_processes_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 4000)
    for part in range(6):
        rows: list[object] = [{"text": text} for text in DOCUMENTS[part * 50 : part * 50 + 50]]
        write_jsonl(tmp_path / f"{part}.jsonl", rows)
    digests = set()
    for workers in (1, 3):
        where = tmp_path / f"with-{workers}"
        data = section(where, f"{tmp_path}/*.jsonl", workers=workers)
        digests.add(quietly(data).digest)
    assert len(digests) == 1


def test_the_held_out_part_depends_on_the_text_alone(tmp_path: Path) -> None:
    held_out = []
    for name, order in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])
        corpus = quietly(section(tmp_path, path))
        split = corpus.index.sources[0].validation
        tokens = TokenStream(corpus, split).read(0, split.tokens)
        held_out.append(sorted(tokens.tolist()))
    assert held_out[0] == held_out[1]


def test_one_small_file_still_gets_a_validation_part(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("hello world\n" * 500, encoding="utf-8")
    corpus = quietly(section(tmp_path, str(tmp_path / "one.txt")))
    source = corpus.index.sources[0]
    assert source.train.tokens + source.validation.tokens == 6001
    assert source.validation.tokens == 300
    corpus.verify()


def test_a_large_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number} of a long text\n" for number in range(60_000)]
    (tmp_path / "long.txt").write_text("".join(lines), encoding="utf-8")
    texts = texts_of(
        quietly(section(tmp_path, str(tmp_path / "long.txt"), validation_fraction=0.4))
    )
    assert len(texts) > 20
    assert all(text.endswith("\n") for text in texts)
    assert sorted("".join(texts).splitlines(keepends=True)) == sorted(lines)


BAD_ROWS = {
    '{"text": "unfinished': "is not JSON (Invalid control character at: line 1 "
    "column 21 (char 20))",
    '["a", "b"]': "is not a JSON object but list",
    '{"body": "x", "id": 3}': "has no field 'text' (fields: body, id; set data.text_field)",
    '{"text": 7}': "field 'text' is not text but int",
    '{"text": null}': "field 'text' is not text but NoneType",
    '{"text": "  "}': "field 'text' is empty",
    '{"text": "\\ud800"}': "field 'text' holds a lone surrogate, which is no character",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_by_file_number_and_reason(row: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{row}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        quietly(section(tmp_path, str(path)))
    assert str(caught.value) == (
        f"{path}, row 3: {BAD_ROWS[row]}; mend it, or type data.on_bad_row=skip to leave such rows "
        "out and list them"
    )
    assert find_prepared(section(tmp_path, str(path))) is None


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b"", "", "the file is empty"),
        (b"fine\nbad \xff byte\nfine\n", ", row 2", "is not UTF-8"),
    ],
)
def test_an_empty_or_undecodable_text_is_named(
    content: bytes, place: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        quietly(section(tmp_path, str(path)))
    assert str(caught.value).startswith(f"{path}{place}: {reason}; mend it")


def test_a_replacement_character_that_was_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a \ufffd b\n" * 100, encoding="utf-8")
    assert quietly(section(tmp_path, str(tmp_path / "text.txt"))).tokens("train") > 0


def test_skipped_rows_are_counted_and_listed(tmp_path: Path) -> None:
    rows: list[object] = [{"text": text} for text in DOCUMENTS]
    rows[10], rows[20] = {"text": ""}, {"body": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = quietly(section(tmp_path, path, on_bad_row="skip", bad_row_budget=0.01))
    assert corpus.index.bad_rows == 2
    listed = (corpus.folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in listed] == [11, 21]


def test_too_many_bad_rows_stop_the_work_and_keep_the_list(tmp_path: Path) -> None:
    rows: list[object] = [{"text": ""}] * 5 + [{"text": text} for text in DOCUMENTS]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        quietly(section(tmp_path, path, on_bad_row="skip", bad_row_budget=0.01))
    [kept] = (tmp_path / "prepared").glob("*.quarantine.jsonl")
    assert str(caught.value) == (
        "5 of 305 rows are bad, more than data.bad_row_budget=0.01 allows; they are listed in "
        f"{kept}. "
        f"The first: {path}, row 1: field 'text' is empty. Mend them, or raise the budget"
    )


def test_a_corrupt_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        quietly(section(tmp_path, str(tmp_path / "bad.parquet")))


def test_sources_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no file matches"):
        quietly(section(tmp_path, f"{tmp_path}/none/*.jsonl"))
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="the folder holds jsonl, text; name one kind with a glob"):
        quietly(section(tmp_path, str(tmp_path)))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be opened as a Hugging Face dataset"):
        quietly(section(tmp_path, "nobody/no-such-dataset"))


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    rows: list[object] = [{"text": text} for text in DOCUMENTS]
    return quietly(section(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows)))


def test_every_single_byte_flip_of_a_corpus_is_found(corpus: PreparedCorpus) -> None:
    generator = np.random.default_rng(0)
    files = [corpus.folder / "index.json", *corpus.folder.glob("source-*/*.bin")]
    for _ in range(200):
        path = files[generator.integers(len(files))]
        original = path.read_bytes()
        changed = bytearray(original)
        changed[generator.integers(len(changed))] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises(DataError):
            read_corpus(corpus.folder).verify()
        path.write_bytes(original)
    read_corpus(corpus.folder).verify()


def test_a_corrupt_shard_is_named_with_its_remedy(corpus: PreparedCorpus) -> None:
    shard = next(corpus.folder.glob("source-0/train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError) as caught:
        corpus.verify()
    assert f"corpus shard {shard}: has " in str(caught.value)
    assert f"Delete {corpus.folder} and run `interlace prepare` again" in str(caught.value)


def test_a_preparer_killed_in_the_middle_leaves_nothing_visible(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "word " * 400}) + "\n" for _ in range(20_000))
    (tmp_path / "big.jsonl").write_text(lines, encoding="utf-8")
    code = (
        "import sys\n"
        "from interlace.trainer.config.schema import DataSection\n"
        "from interlace.trainer.data.prepare import prepare\n"
        "prepare(DataSection(source=sys.argv[1], prepared_dir=sys.argv[2]), print)\n"
    )
    words = [str(tmp_path / "big.jsonl"), str(tmp_path / "prepared")]
    victim = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "prepared").glob("*.inflight/tokenizer.json")):
        assert time.monotonic() < deadline
        os.sched_yield()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list((tmp_path / "prepared").glob("*/index.json"))
    data = DataSection(source=words[0], prepared_dir=words[1])
    quietly(data).verify()
    assert not list((tmp_path / "prepared").glob("*.inflight"))


def test_memory_stays_flat_however_large_the_corpus(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from interlace.trainer.config.schema import DataSection\n"
        "from interlace.trainer.data.prepare import prepare\n"
        "prepare(DataSection(source=sys.argv[1], prepared_dir=sys.argv[2]), lambda _: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    peaks = []
    for name, rows in (("small", 2_000), ("large", 120_000)):
        line = json.dumps({"text": "word " * 100}) + "\n"
        path = tmp_path / f"{name}.jsonl"
        path.write_text(line * rows, encoding="utf-8")
        words = [sys.executable, "-c", code, str(path), str(tmp_path / "prepared")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    # 60 MB of text; buffers hold one shard of 32 MiB twice while it is written.
    assert peaks[1] - peaks[0] < 160, peaks


def test_rows_are_windows_of_the_stream_also_across_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 1000)
    rows: list[object] = [{"text": text} for text in DOCUMENTS]
    data = section(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    corpus = quietly(data)
    split = corpus.index.sources[0].train
    assert len(split.shards) > 5
    stream = TokenStream(corpus, split).read(0, split.tokens)
    config = RunConfig(data=data, train=TrainSection(tokens_per_step=128))
    training = TrainingRows(corpus, config)
    for step in range(20):
        batch = training.batch(step, range(4))
        for number in range(4):
            row = training.order[step * 4 + number].row
            assert (batch[number] == stream[row * 32 : row * 32 + 33]).all()
        assert (training.batch(step, [2, 3]) == batch[2:]).all()


def test_too_few_tokens_are_refused_with_numbers(corpus: PreparedCorpus) -> None:
    tokens = corpus.tokens("train")
    data = DataSection(source="stdlib", sequence_length=tokens)
    with pytest.raises(DataError, match=f"holds {tokens:,} training tokens, less than one row"):
        TrainingRows(corpus, RunConfig(data=data, train=TrainSection(tokens_per_step=tokens)))
    data = DataSection(source="stdlib", sequence_length=32)
    with pytest.raises(DataError, match=r"less than one step of train\.tokens_per_step=320000"):
        TrainingRows(corpus, RunConfig(data=data, train=TrainSection(tokens_per_step=320_000)))
    data = DataSection(source="stdlib", sequence_length=20_000)
    with pytest.raises(DataError, match="the validation split holds"):
        ValidationRows(corpus, RunConfig(data=data))


def test_segments_and_positions_equal_a_plain_loop() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, size=(6, 40))
    segments = segments_of(tokens, end_of_text=0)
    positions = positions_of(segments)
    for row in range(6):
        segment, position = 0, -1
        for column in range(40):
            position += 1
            if tokens[row, column] == 0:
                segment += 1
                position = 0
            assert (segments[row, column], positions[row, column]) == (segment, position)
