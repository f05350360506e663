"""Which back end serves a call of attention, and why.

The nearest measured cell decides (`measurements`); where none is near, a rule of preference does.
Back ends that cannot serve the call are passed over, cells that are known to be wrong do not count,
and `reference`, which takes quadratic memory, is used only by name. Choosing is a few comparisons;
the words are made when someone asks for them.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

from interlace.kernels.attention import sdpa
from interlace.kernels.attention.backends import BACKENDS, Backend
from interlace.kernels.attention.measurements import (
    Row,
    fastest_first,
    nearest_row,
    rows_of,
)
from interlace.kernels.attention.request import Request

FORCED_BY = "INTERLACE_ATTENTION"
"""Environment variable that names a back end for calls that leave the choice open."""


class Rule(NamedTuple):
    """An order of preference where nothing was measured, and the reason for it."""

    order: tuple[str, ...]
    reason: str


RULES = {
    "cpu": Rule(("sdpa", "chunked"), "on a CPU torch's fused kernel comes first"),
    "cpu twice": Rule(("chunked",), "on a CPU the second derivative is taken in slices"),
    "gpu twice": Rule(
        ("triton", "chunked"), "our kernels have the second derivative in linear memory"
    ),
    "deterministic": Rule(
        ("triton", "sdpa", "flash_attn", "flex", "chunked"),
        "our kernels give equal bits by construction; the others' backward adds in any order "
        "unless told not to, and is slower then",
    ),
    "plain": Rule(
        ("sdpa", "flash_attn", "triton", "flex", "chunked"),
        "torch's fused kernels need no mask for this",
    ),
    "masked": Rule(
        ("flex", "flash_attn", "triton", "sdpa", "chunked"),
        "kernels that skip hidden blocks come before one that is handed the whole mask",
    ),
}
"""What is preferred where no measured cell is near."""


@dataclass(frozen=True)
class Choice:
    """A back end for a request.

    Attributes:
        backend: What will run.
        request: What it was chosen for.
        forced_by: Who named it, as a person would type it; None where it was chosen.
    """

    backend: Backend
    request: Request
    forced_by: str | None = None

    def reasons(self) -> tuple[str, ...]:
        """Return why it was chosen, a sentence each."""
        remarks = [sdpa.known_bad(self.request)] if self.backend.name == "sdpa" else []
        said = tuple(remark for remark in remarks if remark is not None)
        if self.forced_by is not None:
            return (f"forced by {self.forced_by}", *said)
        row = row_of(self.request)
        ordered = order_of(self.request)
        decided_by_row = row is not None and self.backend.name in times_of(row, self.request)
        if row is not None and decided_by_row:
            rivals = [
                name
                for name in times_of(row, self.request)
                if name in ordered and BACKENDS[name].why_not(self.request) is None
            ]
            what = "the fastest of" if len(rivals) > 1 else "the one there is of"
            lead = f"chosen because it is {what} {', '.join(rivals)} in the nearest measured cell"
            return (f"{lead} ({row.named()}; {row.source})", *said, *problems(self.request))
        cell = "no measured cell is near" if row is None else "no back end of its cell can serve it"
        why_no_row = cells_do_not_apply(self.request) or cell
        rule = rule_of(self.request)
        return (
            f"chosen by rule, since {why_no_row}: {rule.reason}",
            *said,
            *problems(self.request),
        )

    def others(self) -> dict[str, str]:
        """Return, for every other back end, why it was not chosen."""
        row = row_of(self.request)
        times = {} if row is None else times_of(row, self.request)
        mine = times.get(self.backend.name)
        found: dict[str, str] = {}
        for name, backend in BACKENDS.items():
            if name == self.backend.name:
                continue
            why_not = backend.why_not(self.request)
            if why_not is not None:
                found[name] = f"cannot serve this call: {why_not}"
            elif name == "reference":
                found[name] = "takes quadratic memory; used only by name"
            elif name in times and mine is not None:
                found[name] = compared(times[name] / mine, row)
            elif name not in order_of(self.request):
                found[name] = "is for tests here; used only by name"
            else:
                found[name] = "comes later" + ("" if row is None else ", not measured in this cell")
        return found

    def explain(self) -> str:
        """Return the choice in words."""
        lines = [f"{self.backend.name}: {self.backend.what}", *self.reasons()]
        lines += [f"not {name}: {why}" for name, why in self.others().items()]
        return "\n".join(lines)


def choose(request: Request, backend: str = "auto") -> Choice:
    """Return the back end for a request.

    Args:
        request: The call.
        backend: A name, or `auto`; a name wins over the environment variable.

    Raises:
        ValueError: The name is unknown, or the back end it names cannot serve the request.
    """
    source = f"backend={backend!r}"
    if backend == "auto" and os.environ.get(FORCED_BY):
        backend = os.environ[FORCED_BY]
        source = f"{FORCED_BY}={backend}"
    if backend == "auto":
        for name in order_of(request):
            if BACKENDS[name].why_not(request) is None:
                return Choice(BACKENDS[name], request)
        raise AssertionError("chunked serves everything")
    if backend not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"attention: {source}: must be one of {known}")
    why_not = BACKENDS[backend].why_not(request)
    if why_not is not None:
        raise ValueError(f"attention: {source} cannot serve this call: {why_not}")
    return Choice(BACKENDS[backend], request, forced_by=source)


def order_of(request: Request) -> tuple[str, ...]:
    """Return the back ends that may be chosen, best first: as measured, then as the rule has it."""
    rule = rule_of(request).order
    if cells_do_not_apply(request) is not None:
        return rule
    found = fastest_first(*cell_of(request))
    measured = tuple(name for name in found if name in rule and counts(name, request))
    return (*measured, *(name for name in rule if name not in measured))


def rule_of(request: Request) -> Rule:
    """Return the order of preference where nothing was measured."""
    if request.device != "cuda":
        return RULES["cpu" if request.order == 1 else "cpu twice"]
    if request.order > 1:
        return RULES["gpu twice"]
    if request.deterministic and request.needs_grad:
        return RULES["deterministic"]
    return RULES["masked" if request.whole_mask else "plain"]


def cells_do_not_apply(request: Request) -> str | None:
    """Return why no measured cell says anything about a request, or None."""
    if request.queries != request.keys:
        return "cells are of as many queries as keys"
    if request.order > 2:
        return "cells go up to the second derivative"
    if "alibi" in request.extras:
        return "cells are without ALiBi"
    if request.deterministic and request.device == "cuda":
        return "cells are of kernels that need not be deterministic"
    return None


def cell_of(request: Request) -> tuple[str, str, int, int, str, str]:
    """Return the cell that a request asks for, its length rounded up to a power of two."""
    length = 1
    # Comparisons and not a logarithm: a compiler may trace this with a length that it leaves open.
    while length < request.keys:
        length *= 2
    work = "forward+backward" if request.order == 1 else "double_backward"
    dtype = str(request.dtype).removeprefix("torch.")
    return request.architecture, dtype, request.head_width, length, request.mask, work


def row_of(request: Request) -> Row | None:
    """Return the measured row that speaks of a request, or None."""
    return None if cells_do_not_apply(request) else nearest_row(*cell_of(request))


def times_of(row: Row, request: Request) -> dict[str, float]:
    """Return the times of a row that count, fastest first."""
    times = row.times
    return {
        name: times[name] for name in sorted(times, key=times.__getitem__) if counts(name, request)
    }


def counts(name: str, request: Request) -> bool:
    """Whether the measured time of a back end speaks of a request: not in a known-bad cell."""
    return name != "sdpa" or sdpa.known_bad(request) is None


def compared(ratio: float, row: Row | None) -> str:
    """Return how much slower a back end is in a cell."""
    assert row is not None
    measured = "" if row.relative is None else " as published"
    if ratio < 1.0:
        return f"{1 / ratio:.2f} times as fast{measured}, but used only by name"
    return f"takes {ratio:.2f} times as long in that cell{measured}"


def problems(request: Request) -> tuple[str, ...]:
    """Return what is wrong with the user's own measurements, if anything is."""
    problem = rows_of(request.architecture)[2]
    return () if problem is None else (f"not counted: {problem}",)
