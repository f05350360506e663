"""Measured times of attention: where each back end was fastest, and who says so.

Rows ship in `measured.json`; those that a benchmark measured on a user's own machine lie in the
cache folder and win over them. A row is one cell: architecture, dtype, head width, length, mask and
pass, with the milliseconds of every back end that was tried (`relative` times, the fastest 1, where
a publication gives only ratios). A call is answered by the nearest cell of the same architecture,
mask and pass; lengths and head widths may differ by a factor of two, bf16 and fp16 count as one.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from interlace.kernels.attention.request import Mask

Pass = Literal["forward+backward", "double_backward"]
NEAR = 1.0
"""Powers of two by which length and head width of a call may differ from a cell's."""


class Row(BaseModel):
    """One cell of the table.

    Attributes:
        architecture: `cpu`, or a GPU's compute capability as in `sm90`.
        dtype: As torch prints it, without `torch.`.
        head_width: K.
        length: T, queries and keys alike.
        mask: The kind of mask, as a request names it.
        work: Forward and first backward together, or all of a second derivative (`pass` in JSON).
        milliseconds: Time by back end.
        relative: Time by back end as a multiple of the fastest, instead of milliseconds.
        source: Who measured what on which machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    architecture: str = Field(min_length=1)
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    head_width: int = Field(ge=1)
    length: int = Field(ge=1)
    mask: Mask
    work: Pass = Field(alias="pass")
    milliseconds: dict[str, float] | None = None
    relative: dict[str, float] | None = None
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def has_times(self) -> "Row":
        """Refuse a row that says nothing, or says it twice."""
        if (self.milliseconds is None) == (self.relative is None):
            raise ValueError("give either milliseconds or relative")
        times = self.times
        if not times or not all(0.0 < time < math.inf for time in times.values()):
            raise ValueError("times must be positive numbers, of one back end at least")
        return self

    @property
    def times(self) -> dict[str, float]:
        """Time by back end, in whichever unit the row has."""
        times = self.milliseconds or self.relative
        return times or {}

    @property
    def cell(self) -> tuple[object, ...]:
        """What the row is about; one row of each is kept."""
        return (self.architecture, self.dtype, self.head_width, self.length, self.mask, self.work)

    def named(self) -> str:
        """Return the cell in words."""
        return (
            f"{self.architecture}, {self.dtype}, heads {self.head_width} wide, length "
            f"{self.length}, mask {self.mask}, {self.work.replace('_', ' ')}"
        )


ROWS = TypeAdapter(list[Row])


def shipped_path() -> Path:
    """Return the file of the rows that ship with the project."""
    return Path(str(resources.files("interlace") / "kernels" / "attention" / "measured.json"))


def user_path(architecture: str) -> Path:
    """Return the file of the rows that were measured on machines of this user."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "interlace" / f"attention-{architecture}-times.json"


def read_rows(path: Path) -> list[Row]:
    """Read a table.

    Raises:
        ValueError: The file is no table; the message names it, the row and what to do.
    """
    try:
        return ROWS.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" for part in first["loc"]) or "the file"
        raise ValueError(
            f"{path}: {where}: {first['msg']}; it must be a list of rows as "
            "interlace.kernels.attention.measurements.Row describes them: mend or delete it"
        ) from error


def merge_rows(rows: Iterable[Row], path: Path | None = None) -> list[Path]:
    """Add rows to tables and write them; a row takes the place of an earlier one of its cell.

    Args:
        rows: What was measured.
        path: The table; by default each architecture's in the user's cache folder.

    Returns:
        The files that were written.

    Raises:
        ValueError: A table that is there already cannot be read.
        OSError: A table cannot be written.
    """
    by_path: dict[Path, list[Row]] = {}
    for row in rows:
        by_path.setdefault(path or user_path(row.architecture), []).append(row)
    for target, new in by_path.items():
        old = read_rows(target) if target.is_file() else []
        kept = {row.cell: row for row in [*old, *new]}
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_text(written(list(kept.values())), encoding="utf-8")
        partial.replace(target)
    rows_of.cache_clear()
    return list(by_path)


def written(rows: Sequence[Row]) -> str:
    """Return rows as a JSON list, a line each."""
    lines = (
        json.dumps(row.model_dump(by_alias=True, exclude_none=True))
        for row in sorted(rows, key=lambda row: [str(part).rjust(8) for part in row.cell])
    )
    return "[\n" + ",\n".join(lines) + "\n]\n"


@cache
def rows_of(architecture: str) -> tuple[tuple[Row, ...], tuple[Row, ...], str | None]:
    """Return an architecture's rows, the user's and those that ship, read once, and what is wrong
    with the user's table, if anything is: then only the others count.
    """
    shipped = tuple(row for row in read_rows(shipped_path()) if row.architecture == architecture)
    path, problem, own = user_path(architecture), None, list[Row]()
    if path.is_file():
        try:
            own = read_rows(path)
        except (ValueError, OSError) as error:
            problem = str(error)
    return tuple(row for row in own if row.architecture == architecture), shipped, problem


def nearest_row(
    architecture: str, dtype: str, head_width: int, length: int, mask: str, work: str
) -> Row | None:
    """Return the row of the nearest cell, or None if none is near; the user's own come first."""

    def distance(row: Row) -> float:
        if (row.mask, row.work) != (mask, work) or kin(row.dtype) != kin(dtype):
            return math.inf
        apart = (math.log2(row.length / length), math.log2(row.head_width / head_width))
        if max(abs(each) for each in apart) > NEAR:
            return math.inf
        return sum(abs(each) for each in apart) + 0.01 * (row.dtype != dtype)

    for rows in rows_of(architecture)[:2]:
        best = min(rows, key=distance, default=None)
        if best is not None and distance(best) < math.inf:
            return best
    return None


def kin(dtype: str) -> str:
    """Return a dtype's name, one for the two half precisions."""
    return "half" if dtype in {"bfloat16", "float16"} else dtype


Answer = TypeVar("Answer", bound=Callable[..., Any])


def constant(function: Answer) -> Answer:
    """Let compilers call a function once, while they trace, and take its answer as a constant.

    It is what `torch.compiler.assume_constant_result` does, without the second that loading the
    compiler takes in every process that never compiles.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@constant
def fastest_first(
    architecture: str, dtype: str, head_width: int, length: int, mask: str, work: str
) -> tuple[str, ...]:
    """Return the back ends of the nearest cell, fastest first; none if no cell is near."""
    row = nearest_row(architecture, dtype, head_width, length, mask, work)
    return () if row is None else tuple(sorted(row.times, key=row.times.__getitem__))
