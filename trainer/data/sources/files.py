"""Local files: plain text, JSON lines and parquet, read through `datasets` as streams.

Text and JSON lines are read line by line, so that a row has an exact number. A text file is one
document; one longer than `PIECE_CHARACTERS` is cut at line ends into pieces that each count as a
document, which keeps memory flat and gives a single large file a validation split.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from interlace.trainer.data.sources.base import (
    BadRow,
    Document,
    SourceSpec,
    Unit,
    kind_of,
    matching_paths,
    source_kind,
)
from interlace.trainer.errors import DataError

PIECE_CHARACTERS = 65_536
SMALL_FILE_BYTES = 2**20
EXCERPT_CHARACTERS = 200


def file_units(spec: SourceSpec) -> list[Unit]:
    """Return the files of a location: one file, a glob, or all files of the kind below a folder.

    Raises:
        DataError: Nothing matches.
    """
    path = Path(spec.location).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if kind_of(file) == spec.kind]
    else:
        found = matching_paths(spec.location)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(
            f"data.source={spec.kind}:{spec.location}: no file matches (looked from {Path.cwd()})"
        )
    return [unit_of(file) for file in files]


def unit_of(file: Path) -> Unit:
    """Return one file as a unit of work."""
    status = file.stat()
    return Unit(str(file), status.st_size, f"{file}:{status.st_size}:{status.st_mtime_ns}")


def stream(
    builder: str, paths: Sequence[str], options: Mapping[str, str | bool]
) -> Iterator[dict[str, object]]:
    """Read files row by row through `datasets`.

    Raises:
        DataError: The library cannot read them.
    """
    import datasets

    try:
        files = [glob.escape(path) for path in paths]
        rows = datasets.load_dataset(
            builder,
            data_files=files,
            split="train",
            streaming=True,
            **cast(dict[str, Any], options),
        )
        for row in rows:
            yield cast(dict[str, object], row)
    except Exception as error:  # pyarrow, gzip and the library itself all have their own families
        cause = error.__cause__ or error
        raise DataError(f"{', '.join(paths)}: cannot be read as {builder}: {cause}") from error


def files_with_lines(units: Sequence[Unit]) -> Iterator[tuple[Unit, Iterable[str]]]:
    """Yield every file with its lines, line ends kept; undecodable bytes become U+FFFD.

    Opening a stream costs the library a tenth of a second, so small files are read many at a time,
    each as one row; large ones (and compressed ones, whose size is not known) line by line.
    """
    for large, group in itertools.groupby(units, is_large):
        if large:
            for unit in group:
                yield unit, lines(unit.location)
            continue
        small = list(group)
        options = {"sample_by": "document", "encoding_errors": "replace"}
        rows = stream("text", [unit.location for unit in small], options)
        for unit, row in zip(small, rows, strict=True):
            yield unit, io.StringIO(str(row["text"]))


def is_large(unit: Unit) -> bool:
    """Whether a file is read as a stream of lines rather than whole."""
    return unit.bytes > SMALL_FILE_BYTES or unit.location.endswith((".gz", ".zst"))


def lines(path: str) -> Iterator[str]:
    """Yield the lines of one file."""
    options = {"sample_by": "line", "keep_linebreaks": True, "encoding_errors": "replace"}
    for row in stream("text", [path], options):
        yield str(row["text"])


def first_undecodable(path: str) -> int | None:
    """Return the byte offset of the first byte that is not UTF-8, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
        while block := file.read(2**20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(block)
    return None


class Decodability:
    """Tells whether a U+FFFD in a file was written there or stands for bytes that are not UTF-8."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.known: bool | None = None

    def refuses(self, line: str) -> bool:
        """Whether `line` holds undecodable bytes; the file is looked through once, when first
        needed.
        """
        if "\ufffd" not in line:
            return False
        if self.known is None:
            self.known = first_undecodable(self.path) is not None
        return self.known


@source_kind("text")
class TextFiles:
    """Plain text files."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return the path, size and time of every file."""
        return [unit.fingerprint for unit in self.units(spec)]

    def units(self, spec: SourceSpec) -> list[Unit]:
        """Return one unit per file."""
        return file_units(spec)

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]:
        """Yield the files' text in pieces; a line that does not decode is a bad row."""
        for unit, content in files_with_lines(units):
            yield from self.pieces(unit, content)

    def pieces(self, unit: Unit, content: Iterable[str]) -> Iterator[Document | BadRow]:
        """Cut one file at line ends."""
        decodable = Decodability(unit.location)
        piece: list[str] = []
        size = 0
        yielded = False
        for number, line in enumerate(content, start=1):
            if decodable.refuses(line):
                yielded = True
                yield BadRow(unit.location, number, "is not UTF-8", line[:EXCERPT_CHARACTERS])
                continue
            piece.append(line)
            size += len(line)
            if size >= PIECE_CHARACTERS:
                yielded = True
                yield Document("".join(piece))
                piece, size = [], 0
        text = "".join(piece)
        if text.strip():
            yield Document(text)
        elif not yielded:
            yield BadRow(unit.location, 0, "the file is empty")


@source_kind("jsonl")
class JsonLines:
    """Files with one JSON object a line."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return the path, size and time of every file."""
        return [unit.fingerprint for unit in self.units(spec)]

    def units(self, spec: SourceSpec) -> list[Unit]:
        """Return one unit per file."""
        return file_units(spec)

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]:
        """Yield the text field of every line."""
        for unit, content in files_with_lines(units):
            yield from self.rows(spec, unit, content)

    def rows(
        self, spec: SourceSpec, unit: Unit, content: Iterable[str]
    ) -> Iterator[Document | BadRow]:
        """Yield the text field of every line of one file."""
        decodable = Decodability(unit.location)
        empty = True
        for number, line in enumerate(content, start=1):
            if not line.strip():
                continue
            empty = False
            reason = "is not UTF-8" if decodable.refuses(line) else None
            text = "" if reason else text_of_json(line, spec.text_field)
            if isinstance(text, Document):
                yield text
            else:
                yield BadRow(unit.location, number, reason or text, line[:EXCERPT_CHARACTERS])
        if empty:
            yield BadRow(unit.location, 0, "the file is empty")


def text_of_json(line: str, field: str) -> Document | str:
    """Return the document of one JSON line, or why there is none."""
    try:
        row = json.loads(line)
    # ValueError: also a number of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(row, dict):
        return f"is not a JSON object but {type(row).__name__}"
    return text_of_row(cast(dict[str, object], row), field)


def text_of_row(row: dict[str, object], field: str) -> Document | str:
    """Return the document of one row, or why there is none."""
    if field not in row:
        return f"has no field {field!r} (fields: {', '.join(row) or 'none'}; set data.text_field)"
    text = row[field]
    if not isinstance(text, str):
        return f"field {field!r} is not text but {type(text).__name__}"
    if not text.strip():
        return f"field {field!r} is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"field {field!r} holds a lone surrogate, which is no character"
    return Document(text)


@source_kind("parquet")
class Parquet:
    """Parquet files."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return the path, size and time of every file."""
        return [unit.fingerprint for unit in self.units(spec)]

    def units(self, spec: SourceSpec) -> list[Unit]:
        """Return one unit per file."""
        return file_units(spec)

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]:
        """Yield the text column of every row."""
        for unit in units:
            number = 0
            for number, row in enumerate(stream("parquet", [unit.location], {}), start=1):
                text = text_of_row(row, spec.text_field)
                yield text if isinstance(text, Document) else BadRow(unit.location, number, text)
            if number == 0:
                yield BadRow(unit.location, 0, "the file is empty")
