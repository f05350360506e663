"""Tokenise once: sources in, a prepared corpus out, in parallel, atomically, with flat memory.

The folder's name carries a digest of everything that the tokens depend on, so that a second call
finds the work done and changed input makes a new folder. Work is cut into tasks that do not depend
on the number of processes, hence neither does the result. Everything is written into a folder
beside the final one, which is renamed when the index is in place.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from interlace.trainer.config.schema import DataSection
from interlace.trainer.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    Index,
    PreparedCorpus,
    Shard,
    ShardWriter,
    SourceIndex,
    Split,
    SplitName,
    digest_of,
    index_text,
    join_splits,
    read_corpus,
    write_shard,
)
from interlace.trainer.data.sources.base import (
    BadRow,
    Document,
    SourceSpec,
    Unit,
    source_of,
    specs_of,
)
from interlace.trainer.data.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)
from interlace.trainer.data.workers import map_in_processes
from interlace.trainer.errors import DataError
from interlace.trainer.registry import LOADED, load_plugins

TASK_BYTES = 8 * 2**20
SHARD_TOKENS = 16 * 2**20
BATCH_CHARACTERS = 2**20
BPE_TRAINING_CHARACTERS = 64 * 2**20
TOKENIZER_NAME = "tokenizer.json"
QUARANTINE_NAME = "quarantine.jsonl"


@dataclass(frozen=True)
class Task:
    """Units of one source that one process tokenises in order; `plugins` are the files of a user's
    own that it may need for that.
    """

    number: int
    source: int
    spec: SourceSpec
    units: tuple[Unit, ...]
    folder: Path
    dtype: str
    validation_fraction: float
    skip_bad_rows: bool
    end_of_text: str | None
    plugins: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the input."""
        return sum(unit.bytes for unit in self.units)


@dataclass(frozen=True)
class TaskResult:
    """What a task wrote and met."""

    task: Task
    train: Split
    validation: Split
    rows: int
    bad_rows: tuple[BadRow, ...]


@dataclass(frozen=True)
class Inputs:
    """The sources of a recipe and where their tokens belong; nothing is read yet."""

    data: DataSection
    specs: list[SourceSpec]
    folder: Path

    def list_units(self) -> list[list[Unit]]:
        """List the files and shards of every source; may need the network."""
        return [source_of(spec.kind).units(spec) for spec in self.specs]


def list_inputs(data: DataSection) -> Inputs:
    """Identify all sources and derive the corpus folder; needs no network.

    Raises:
        DataError: A source does not exist.
    """
    specs = specs_of(data)
    identities = [source_of(spec.kind).identity(spec) for spec in specs]
    tokenizer = data.tokenizer
    if tokenizer == "bpe":
        tokenizer = f"bpe-{data.vocabulary_size}"
    elif tokenizer != "bytes":
        content = Path(tokenizer).expanduser().read_bytes()
        tokenizer = hashlib.sha256(content + (data.end_of_text or "").encode()).hexdigest()
    key = digest_of(
        {
            "format": FORMAT_VERSION,
            # Weights order the rows of a run and do not change the tokens.
            "sources": [{**asdict(spec), "weight": None} for spec in specs],
            "inputs": identities,
            "tokenizer": tokenizer,
            "validation_fraction": data.validation_fraction,
            "on_bad_row": data.on_bad_row,
        }
    )
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(specs[0].location or specs[0].kind).name).strip("-")
    kind = data.tokenizer if data.tokenizer in {"bytes", "bpe"} else "custom"
    folder = Path(data.prepared_dir).expanduser().absolute()
    return Inputs(data, specs, folder / f"{label[:40] or 'corpus'}-{kind}-{key[:12]}")


def find_prepared(data: DataSection) -> PreparedCorpus | None:
    """Return the prepared corpus of a recipe if it is there, preparing nothing."""
    inputs = list_inputs(data)
    return read_corpus(inputs.folder) if (inputs.folder / INDEX_NAME).is_file() else None


def prepare(data: DataSection, announce: Callable[[str], None]) -> PreparedCorpus:
    """Return the prepared corpus of a recipe, tokenising it if nobody has.

    Args:
        data: The recipe's data table.
        announce: Receives single lines for a person; a progress bar is drawn on a terminal.

    Raises:
        DataError: Input that cannot be read; names file and row.
    """
    inputs = list_inputs(data)
    with exclusive(inputs.folder):
        if (inputs.folder / INDEX_NAME).is_file():
            return read_corpus(inputs.folder)
        units = inputs.list_units()
        total = sum(unit.bytes for listed in units for unit in listed)
        announce(f"preparing {total / 2**20:.1f} MiB of text into {inputs.folder}")
        working = inputs.folder.with_name(inputs.folder.name + ".inflight")
        # The lock is ours, so whatever lies there is of a preparer that died.
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        try:
            index = build(inputs, units, working)
            finish(working, inputs.folder, index)
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise
        corpus = read_corpus(inputs.folder)
        announce(
            f"prepared {corpus.tokens('train'):,} training and {corpus.tokens('validation'):,} "
            "validation "
            f"tokens, vocabulary {index.vocabulary_size:,}"
        )
        return corpus


@contextmanager
def exclusive(folder: Path) -> Generator[None]:
    """Hold the lock of one corpus folder, so that two preparers take turns."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(inputs: Inputs, units: list[list[Unit]], working: Path) -> Index:
    """Tokenise everything into `working`; return the index that is to be written."""
    data = inputs.data
    tokenizer = make_tokenizer(inputs, units)
    tokenizer.save(working / TOKENIZER_NAME)
    dtype = "uint16" if tokenizer.vocabulary_size <= 2**16 else "uint32"
    results = run_tasks(
        cut_tasks(inputs, units, working, dtype), data.workers or os.cpu_count() or 1
    )
    bad_rows = quarantine(inputs, working, results)
    sources: list[SourceIndex] = []
    for number, spec in enumerate(inputs.specs):
        own = [result for result in results if result.task.source == number]
        train = join_splits([result.train for result in own])
        validation = join_splits([result.validation for result in own])
        if not (train.tokens and validation.tokens):
            whole = join_splits([train, validation])
            train, validation = hold_out_tail(
                working, number, dtype, whole, data.validation_fraction
            )
        sources.append(
            SourceIndex(description=spec.description, train=train, validation=validation)
        )
    return Index(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        bad_rows=bad_rows,
        sources=tuple(sources),
    )


def make_tokenizer(inputs: Inputs, units: list[list[Unit]]) -> Tokenizer:
    """Return the recipe's tokenizer, training it if it is to be trained."""
    if inputs.data.tokenizer == "bytes":
        return byte_tokenizer()
    if inputs.data.tokenizer == "bpe":
        return train_bpe(training_texts(inputs, units), inputs.data.vocabulary_size)
    return load_tokenizer(Path(inputs.data.tokenizer).expanduser(), inputs.data.end_of_text)


def training_texts(inputs: Inputs, units: list[list[Unit]]) -> Iterator[str]:
    """Yield training documents, an equal share of the first 64 Mi characters from every source."""
    share = BPE_TRAINING_CHARACTERS // len(inputs.specs)
    for spec, listed in zip(inputs.specs, units, strict=True):
        left = share
        fraction = inputs.data.validation_fraction
        for item in source_of(spec.kind).read(spec, listed):
            if isinstance(item, Document) and split_of(item, fraction) == "train":
                yield item.text
                left -= len(item.text)
            if left <= 0:
                break


def split_of(document: Document, validation_fraction: float) -> SplitName:
    """Decide by hash whether a document is held out: independent of order, paths and processes."""
    key = document.text if document.key is None else document.key
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64
    return "validation" if share < validation_fraction else "train"


def cut_tasks(inputs: Inputs, units: list[list[Unit]], working: Path, dtype: str) -> list[Task]:
    """Group the units of each source into tasks of about `TASK_BYTES`."""
    tasks: list[Task] = []
    for source, (spec, listed) in enumerate(zip(inputs.specs, units, strict=True)):
        groups: list[list[Unit]] = []
        size = 0
        for unit in listed:
            if not groups or size + unit.bytes > TASK_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(unit)
            size += unit.bytes
        for group in groups:
            tasks.append(
                Task(
                    number=len(tasks),
                    source=source,
                    spec=spec,
                    units=tuple(group),
                    folder=working,
                    dtype=dtype,
                    validation_fraction=inputs.data.validation_fraction,
                    skip_bad_rows=inputs.data.on_bad_row == "skip",
                    plugins=tuple(map(str, LOADED)),
                    end_of_text=inputs.data.end_of_text,
                )
            )
    return tasks


def run_tasks(tasks: list[Task], workers: int) -> list[TaskResult]:
    """Run all tasks, here or in processes, with a progress bar on a terminal; results in task
    order.
    """
    with progress_bar(sum(task.bytes for task in tasks)) as advance:
        if min(workers, len(tasks)) == 1:
            results: list[TaskResult] = []
            for task in tasks:
                results.append(run_task(task))
                advance(task.bytes)
            return results
        return map_in_processes(run_task, tasks, workers, lambda task: advance(task.bytes))


@contextmanager
def progress_bar(total: int) -> Generator[Callable[[int], None]]:
    """Draw a bar over input bytes where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("tokenising", total=total)
        yield lambda amount: progress.advance(bar, amount)


def run_task(task: Task) -> TaskResult:
    """Tokenise one task's units into its own shards.

    Raises:
        DataError: A bad row, unless they are to be skipped.
    """
    load_plugins(task.plugins)
    tokenizer = load_tokenizer(task.folder / TOKENIZER_NAME, task.end_of_text)
    stem = f"source-{task.source}"
    writers: dict[SplitName, ShardWriter] = {
        split: ShardWriter(
            task.folder, f"{stem}/{split}-{task.number:05d}", task.dtype, SHARD_TOKENS
        )
        for split in ("train", "validation")
    }
    bad: list[BadRow] = []
    rows = 0
    for batch in batches_of(task, bad):
        rows += len(batch)
        for document, ids in zip(
            batch, tokenizer.encode_documents([d.text for d in batch]), strict=True
        ):
            opened = np.concatenate([np.array([tokenizer.end_of_text], np.uint32), ids])
            split = split_of(document, task.validation_fraction)
            writers[split].add(opened, len(document.text.encode("utf-8")))
    train, validation = writers["train"].close(), writers["validation"].close()
    return TaskResult(task, train, validation, rows + len(bad), tuple(bad))


def batches_of(task: Task, bad: list[BadRow]) -> Iterator[list[Document]]:
    """Yield documents in bounded batches; note bad rows, or raise on the first."""
    batch: list[Document] = []
    size = 0
    for item in source_of(task.spec.kind).read(task.spec, task.units):
        if isinstance(item, BadRow):
            if not task.skip_bad_rows:
                raise DataError(
                    f"{place(item)}: {item.reason}; mend it, or type data.on_bad_row=skip to leave "
                    "such rows out and list them"
                )
            bad.append(item)
            continue
        batch.append(item)
        size += len(item.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def place(row: BadRow) -> str:
    """Return file and row as a person would look for them."""
    return f"{row.file}, row {row.row}" if row.row else row.file


def quarantine(inputs: Inputs, working: Path, results: list[TaskResult]) -> int:
    """List bad rows in a file; return their number.

    Raises:
        DataError: There are more than the budget allows; the list is kept beside the corpus folder.
    """
    bad = [row for result in results for row in result.bad_rows]
    total = sum(result.rows for result in results)
    if not bad:
        return 0
    text = "".join(json.dumps(asdict(row)) + "\n" for row in bad)
    (working / QUARANTINE_NAME).write_text(text, encoding="utf-8")
    budget = inputs.data.bad_row_budget
    if len(bad) > budget * total:
        kept = inputs.folder.with_name(f"{inputs.folder.name}.{QUARANTINE_NAME}")
        kept.write_text(text, encoding="utf-8")
        raise DataError(
            f"{len(bad)} of {total} rows are bad, more than data.bad_row_budget={budget} allows; "
            "they are "
            f"listed in {kept}. The first: {place(bad[0])}: {bad[0].reason}. Mend them, or raise "
            "the budget"
        )
    return len(bad)


def hold_out_tail(
    working: Path, source: int, dtype: str, whole: Split, fraction: float
) -> tuple[Split, Split]:
    """Cut the last tokens of a source off for validation, where hashing left one split empty."""
    if not whole.tokens:
        return whole, Split()
    last = whole.shards[-1]
    width = np.dtype(dtype).itemsize
    data = (working / last.file).read_bytes()
    count = min(max(1, round(fraction * whole.tokens)), last.tokens // 2)
    (working / last.file).unlink()
    parts = (data[: -count * width], data[-count * width :])
    names = (f"source-{source}/train-head.bin", f"source-{source}/validation-tail.bin")
    head, tail = (
        write_shard(working, name, part, width) for name, part in zip(names, parts, strict=True)
    )
    text = round(whole.bytes * count / whole.tokens)
    return (
        part_of(whole, (*whole.shards[:-1], head), whole.bytes - text, whole.documents),
        part_of(whole, (tail,), text, 1),
    )


def part_of(whole: Split, shards: tuple[Shard, ...], text: int, documents: int) -> Split:
    """Return a split made of some shards."""
    tokens = sum(shard.tokens for shard in shards)
    return whole.model_copy(
        update={"shards": shards, "tokens": tokens, "bytes": text, "documents": documents}
    )


def finish(working: Path, folder: Path, index: Index) -> None:
    """Write the index and make the folder visible."""
    with (working / INDEX_NAME).open("w", encoding="utf-8") as file:
        file.write(index_text(index))
        file.flush()
        os.fsync(file.fileno())
    working.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
