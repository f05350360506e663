"""The protocol of a source, its registry, and the reading of `data.source`.

A source lists independent work units (files, shards of a hub dataset); reading a unit yields
documents and bad rows in a fixed order. Units can be read by different processes.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from interlace.trainer.config.schema import DataSection, SourceSection
from interlace.trainer.errors import DataError
from interlace.trainer.registry import Registry


@dataclass(frozen=True)
class Document:
    """One text. `key` decides whether it is held out; the text itself does where it is None."""

    text: str
    key: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that is no document: file, number from 1 (0 for the file as a whole), reason,
    beginning.
    """

    file: str
    row: int
    reason: str
    excerpt: str = ""


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one process reads alone.

    Attributes:
        location: File path, or `shard/shards` of a hub dataset.
        bytes: Size, for progress and for sharing out the work.
        fingerprint: Changes when the content changes.
    """

    location: str
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class SourceSpec:
    """One source of the mixture, read from the recipe: kind, location and options."""

    kind: str
    location: str
    text_field: str
    subset: str | None
    split: str
    weight: float

    @property
    def description(self) -> str:
        """What identifies the source to a person."""
        name = self.kind if not self.location else f"{self.kind}:{self.location}"
        return name if self.subset is None else f"{name} ({self.subset})"


class Source(Protocol):
    """Reads one kind of source."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return what changes when the content does; must not need a network."""
        ...

    def units(self, spec: SourceSpec) -> list[Unit]: ...

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]: ...


SOURCES: Registry[type[Source]] = Registry(
    "source kind",
    "data.source",
    {
        "stdlib": "interlace.trainer.data.sources.stdlib",
        "text": "interlace.trainer.data.sources.files",
        "jsonl": "interlace.trainer.data.sources.files",
        "parquet": "interlace.trainer.data.sources.files",
        "hub": "interlace.trainer.data.sources.hub",
    },
)

SourceClass = TypeVar("SourceClass", bound=Source)


def source_kind(name: str) -> Callable[[type[SourceClass]], type[SourceClass]]:
    """Register a class as the reader of the sources that recipes write as `name:LOCATION`."""
    return SOURCES.register(name)


def source_of(kind: str) -> Source:
    """Return the reader of a kind."""
    return SOURCES.get(kind)()


def specs_of(data: DataSection) -> list[SourceSpec]:
    """Return the sources that a recipe names."""
    if isinstance(data.source, str):
        return [spec_of(SourceSection(source=data.source), data.text_field)]
    return [spec_of(section, data.text_field) for section in data.source]


def spec_of(section: SourceSection, text_field: str) -> SourceSpec:
    """Read one source; see `SourceSection.source` for the grammar.

    Raises:
        DataError: It looks like a path and matches nothing, or names a kind that nobody reads.
    """
    kind, colon, location = section.source.partition(":")
    if section.source == "stdlib":
        kind, location = "stdlib", ""
    elif not (colon and kind in SOURCES.names()):
        kind, location = guess_kind(section.source), section.source
    field = section.text_field or text_field
    return SourceSpec(kind, location, field, section.subset, section.split, section.weight)


def guess_kind(source: str) -> str:
    """Return the kind of a bare name: by extension for files, else a hub dataset."""
    path = Path(source).expanduser()
    matches = matching_paths(source)
    looks_like_path = bool(re.search(r"[*?\[~]|^[./]|\.[A-Za-z0-9]{1,8}$", source))
    if path.is_dir():
        kinds = sorted({kind_of(file) for file in path.rglob("*") if file.is_file()})
        if len(kinds) != 1:
            found = ", ".join(kinds) or "no files"
            raise DataError(
                f"data.source={source}: the folder holds {found}; name one kind with a glob, as in "
                f"data.source={source.rstrip('/')}/*.jsonl"
            )
        return kinds[0]
    if matches:
        return kind_of(matches[0])
    kind, colon, _ = source.partition(":")
    if colon and kind.isidentifier():
        raise DataError(f"{SOURCES.unknown(kind)}; a plug-in's file goes into model.plugins")
    if looks_like_path or source.count("/") > 1:
        raise DataError(
            f"data.source={source}: no file matches (looked from {Path.cwd()}); give a file, a "
            "glob, "
            "`stdlib`, or the name of a Hugging Face dataset"
        )
    return "hub"


def matching_paths(pattern: str) -> list[Path]:
    """Return what a path or glob, relative or absolute, matches."""
    expanded = str(Path(pattern).expanduser())
    found = glob.glob(expanded, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    return [Path(match) for match in sorted(found)]


def kind_of(path: Path) -> str:
    """Return the kind of a file by its extension."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"
