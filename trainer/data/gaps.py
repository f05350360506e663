"""Batches that are left out: `data.skip_batches`, and which batch a step takes instead.

PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps before a loss spike and left out 200
to 500 batches; the same batches did no harm at another state. Batches are numbered as the steps,
from 1, that would have taken them if none were left out. The map is a pure function of the step, as
the order of rows is, so a checkpoint stores nothing of it.
"""

Gaps = tuple[tuple[int, int], ...]
"""First batch left out and the first one after it, of every gap, from 1, in ascending order."""


def parse_gaps(text: str) -> Gaps:
    """Return the gaps that `first:last,first:last` names, the last of each not included."""
    spans = [span.split(":") for span in text.split(",")] if text else []
    return tuple((int(first), int(last)) for first, last in spans)


def gap_text(gaps: Gaps) -> str:
    """Return the text that `parse_gaps` makes these gaps of."""
    return ",".join(f"{first}:{last}" for first, last in gaps)


def with_gap(gaps: Gaps, first: int, last: int) -> Gaps:
    """Return gaps that leave out these batches as well; what overlaps or touches becomes one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((*gaps, (first, last))):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def batch_of(step: int, gaps: Gaps) -> int:
    """Return the number of the batch, from 0, that a step, from 0, takes."""
    batch = step
    for first, last in gaps:
        if batch >= first - 1:
            batch += last - first
    return batch
