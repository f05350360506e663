"""A prepared corpus on disk: shards of fixed-width token ids and the JSON index that vouches for
them.

The index holds counts and the SHA-256 of every shard, and a digest of itself. Opening a corpus
checks all of them, so that a flipped bit is an error with a file name and never a strange loss.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from interlace.trainer.errors import DataError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
SplitName = Literal["train", "validation"]


class Record(BaseModel):
    """Base of the index's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Record):
    """One file of tokens, relative to the corpus folder."""

    file: str
    tokens: int
    sha256: str


class Split(Record):
    """The training or validation part of one source; `bytes` counts UTF-8 text."""

    shards: tuple[Shard, ...] = ()
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


class SourceIndex(Record):
    """One source of the mixture."""

    description: str
    train: Split
    validation: Split

    def split(self, name: SplitName) -> Split:
        """Return a split by name."""
        return self.train if name == "train" else self.validation


class Index(Record):
    """What `index.json` holds, less the digest of itself."""

    format_version: int
    dtype: Literal["uint16", "uint32"]
    vocabulary_size: int
    end_of_text: int
    bad_rows: int
    sources: tuple[SourceIndex, ...]


def index_text(index: Index) -> str:
    """Return `index.json` with the digest of its own content."""
    document = index.model_dump(mode="json")
    return json.dumps({**document, "self_digest": digest_of(document)}, indent=1) + "\n"


def digest_of(document: object) -> str:
    """Return the SHA-256 of canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenised corpus, ready to be opened."""

    folder: Path
    index: Index

    @property
    def digest(self) -> str:
        """Identifies the content: equal digests mean equal tokens in equal order."""
        return digest_of([source.model_dump(mode="json") for source in self.index.sources])

    def tokens(self, split: SplitName) -> int:
        """Return the tokens of a split over all sources."""
        return sum(source.split(split).tokens for source in self.index.sources)

    def bytes_per_token(self, split: SplitName) -> float:
        """Return the bytes of text per token over a whole split."""
        text = sum(source.split(split).bytes for source in self.index.sources)
        return text / max(1, self.tokens(split))

    def verify(self) -> None:
        """Check size and digest of every shard.

        Raises:
            DataError: A shard is missing or altered; names the file and the remedy.
        """
        shards = [
            shard
            for source in self.index.sources
            for split in (source.train, source.validation)
            for shard in split.shards
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            problems = [text for text in threads.map(self.problem_of, shards) if text]
        if problems:
            raise DataError(
                "\n".join(problems)
                + f"\nDelete {self.folder} and run `interlace prepare` again to make it anew."
            )

    def problem_of(self, shard: Shard) -> str | None:
        """Return what is wrong with one shard, or None."""
        path = self.folder / shard.file
        if not path.is_file():
            return f"corpus shard {path}: is missing"
        expected = shard.tokens * np.dtype(self.index.dtype).itemsize
        if path.stat().st_size != expected:
            return f"corpus shard {path}: has {path.stat().st_size} bytes, must have {expected}"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            return (
                f"corpus shard {path}: is corrupt "
                f"(SHA-256 {found[:12]}, must be {shard.sha256[:12]})"
            )
        return None


def read_corpus(folder: Path) -> PreparedCorpus:
    """Read the index of a prepared corpus.

    Raises:
        DataError: The index is missing, altered or of another format.
    """
    path = folder / INDEX_NAME
    remedy = f"delete {folder} and run `interlace prepare` again"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        digest = document.pop("self_digest")
        index = Index.model_validate(document)
    except (OSError, ValueError, KeyError, AttributeError, ValidationError) as error:
        raise DataError(f"corpus index {path}: cannot be read ({error}); {remedy}") from error
    if digest_of(document) != digest:
        raise DataError(f"corpus index {path}: was altered after it was written; {remedy}")
    if index.format_version != FORMAT_VERSION:
        raise DataError(
            f"corpus index {path}: has format {index.format_version}, this program reads "
            f"{FORMAT_VERSION}; {remedy}"
        )
    return PreparedCorpus(folder, index)


class TokenStream:
    """The tokens of one split of one source, all shards joined, memory-mapped.

    Digests were checked when the run began. What is read later is what lies there then, so a file
    that has another size or time by that time is not read.
    """

    def __init__(self, corpus: PreparedCorpus, split: Split) -> None:
        self.paths = [corpus.folder / shard.file for shard in split.shards]
        self.fingerprints = [fingerprint_of(path) for path in self.paths]
        self.maps = [
            np.memmap(
                corpus.folder / shard.file,
                dtype=f"<{np.dtype(corpus.index.dtype).str[1:]}",
                mode="r",
            )
            for shard in split.shards
        ]
        self.starts = list(accumulate((len(part) for part in self.maps), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens of a range, which may cross shards.

        Raises:
            DataError: A shard changed since it was opened.
        """
        touched = [
            number
            for number, (part, first) in enumerate(zip(self.maps, self.starts, strict=False))
            if first < stop and first + len(part) > start
        ]
        for number in touched:
            self.require_unchanged(number)
        parts = [
            self.maps[number][max(0, start - self.starts[number]) : stop - self.starts[number]]
            for number in touched
        ]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def require_unchanged(self, number: int) -> None:
        """Do nothing if one shard's file is the one that was opened.

        Raises:
            DataError: It was changed, replaced or removed.
        """
        path = self.paths[number]
        try:
            found = fingerprint_of(path)
        except OSError:
            found = None
        if found != self.fingerprints[number]:
            raise DataError(
                f"corpus shard {path}: was changed while the run reads it, so the run stops before "
                "it learns from it; the newest checkpoint is untouched. Put the file back, or "
                f"delete {path.parents[1]} to have it made anew, and resume"
            )


def fingerprint_of(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does: its number on the disk, its size and its time."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class ShardWriter:
    """Writes one split of one task: tokens in, shard files with digests out, bounded memory."""

    def __init__(self, folder: Path, stem: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.stem, self.dtype = folder, stem, np.dtype(f"<u{np.dtype(dtype).itemsize}")
        self.shard_tokens = shard_tokens
        self.finished: list[Shard] = []
        self.pending: list[NDArray[np.generic]] = []
        self.pending_tokens = 0
        self.bytes = self.documents = 0

    def add(self, tokens: NDArray[np.uint32], text_bytes: int) -> None:
        """Append one document."""
        self.pending.append(tokens.astype(self.dtype))
        self.pending_tokens += len(tokens)
        self.bytes += text_bytes
        self.documents += 1
        if self.pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard."""
        if not self.pending_tokens:
            return
        data = np.concatenate(self.pending).tobytes()
        name = f"{self.stem}-{len(self.finished):05d}.bin"
        self.finished.append(write_shard(self.folder, name, data, self.dtype.itemsize))
        self.pending, self.pending_tokens = [], 0

    def close(self) -> Split:
        """Write the rest and return what was written."""
        self.flush()
        return join_splits(
            [Split(shards=tuple(self.finished), tokens=sum(s.tokens for s in self.finished))],
            self.bytes,
            self.documents,
        )


def write_shard(folder: Path, name: str, data: bytes, width: int) -> Shard:
    """Write one shard durably and return its record."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Shard(file=name, tokens=len(data) // width, sha256=hashlib.sha256(data).hexdigest())


def join_splits(splits: Sequence[Split], more_bytes: int = 0, more_documents: int = 0) -> Split:
    """Return the splits one after another, with extra counts added."""
    return Split(
        shards=tuple(shard for split in splits for shard in split.shards),
        tokens=sum(split.tokens for split in splits),
        bytes=sum(split.bytes for split in splits) + more_bytes,
        documents=sum(split.documents for split in splits) + more_documents,
    )
