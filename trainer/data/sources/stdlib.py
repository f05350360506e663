"""The Python standard library's own sources: real text that every machine has, read in place.

Tests, installed packages and the few files that are not UTF-8 are left out. Whether a file is held
out depends on its relative path alone, so the split is the same wherever Python is installed.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from interlace.trainer.data.sources.base import BadRow, Document, SourceSpec, Unit, source_kind
from interlace.trainer.data.sources.files import files_with_lines, first_undecodable, unit_of

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@source_kind("stdlib")
class StandardLibrary:
    """Python files of the interpreter's standard library, one document each."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return the path, size and time of every file."""
        return [unit.fingerprint for unit in self.units(spec)]

    def units(self, spec: SourceSpec) -> list[Unit]:
        """Return one unit per file, in order of path."""
        return list(units_of(standard_library()))

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]:
        """Yield the files."""
        for unit, content in files_with_lines(units):
            key = Path(unit.location).relative_to(standard_library()).as_posix()
            yield Document("".join(content), key)


@cache
def units_of(root: Path) -> tuple[Unit, ...]:
    """Return one unit per file below a folder; a library stays as it is while it is used."""
    files = sorted(
        file
        for file in root.rglob("*.py")
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts) and file.stat().st_size > 0
    )
    return tuple(unit_of(file) for file in files if first_undecodable(str(file)) is None)


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])
