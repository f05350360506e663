"""Which of two models is faster, from which length on, and how sure that is.

Rounds are paired: in each, both models were timed one after the other. The median of the ratios of
a length is known to lie between two of the sorted ratios with a confidence that needs no
assumption about their distribution (with five rounds: between the least and the greatest, 94%).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Literal

from interlace.launch.longctx.measuring import Sample

CONFIDENCE = 0.9
LEAST_REPEATS = 5
"""With fewer rounds no interval reaches the confidence."""

Measure = Literal["first token", "each token"]
MEASURES: tuple[Measure, ...] = ("first token", "each token")


@dataclass(frozen=True)
class Interval:
    """A median and where it lies.

    Attributes:
        low: Lower end.
        middle: The median.
        high: Upper end.
        confidence: With which it lies between them.
    """

    low: float
    middle: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Lead:
    """One model is faster than another, at a length and at all longer ones.

    Attributes:
        measure: What is faster.
        faster: Name of the model.
        slower: Name of the other.
        length: The shortest such length, in tokens.
        always: Whether that is the shortest length measured.
        ratio: Time of the faster as a share of the other's, at that length.
    """

    measure: Measure
    faster: str
    slower: str
    length: int
    always: bool
    ratio: Interval


def interval(values: Sequence[float]) -> Interval:
    """Return the median of `values` and the narrowest pair of them, equally far from both ends,
    that holds the true one with the confidence asked for (or the widest pair).
    """
    ordered, count = sorted(values), len(values)
    cut = 0
    while cut + 1 < (count + 1) // 2 and coverage(count, cut + 1) >= CONFIDENCE:
        cut += 1
    return Interval(ordered[cut], median(ordered), ordered[count - 1 - cut], coverage(count, cut))


def coverage(count: int, cut: int) -> float:
    """Return how surely the median lies between the values number `cut` from both ends."""
    outside = sum(math.comb(count, n) for n in range(cut + 1))
    return max(0.0, 1.0 - 2.0 * outside / 2.0**count)


def seconds_of(sample: Sample, measure: Measure) -> list[float]:
    """Return the times of every round."""
    return (sample.prefill if measure == "first token" else sample.decode).seconds


def ratios(
    samples: Sequence[Sample], one: str, other: str, measure: Measure
) -> dict[int, Interval]:
    """Return, by length, the time of one model as a share of another's."""
    by_key = {(sample.name, sample.length): sample for sample in samples}
    lengths = sorted({sample.length for sample in samples})
    found: dict[int, Interval] = {}
    for length in lengths:
        pairs = zip(
            seconds_of(by_key[one, length], measure),
            seconds_of(by_key[other, length], measure),
            strict=True,
        )
        found[length] = interval([first / second for first, second in pairs])
    return found


def leads(samples: Sequence[Sample]) -> list[Lead]:
    """Return, for every pair and measure, who is faster at the longest length and since when;
    nothing for a pair whose interval holds one.
    """
    names = list(dict.fromkeys(sample.name for sample in samples))
    found: list[Lead] = []
    for measure in MEASURES:
        for one, other in combinations(names, 2):
            for faster, slower in ((one, other), (other, one)):
                lead = lead_of(ratios(samples, faster, slower, measure), measure, faster, slower)
                found += [lead] if lead else []
    return found


def lead_of(
    by_length: Mapping[int, Interval], measure: Measure, faster: str, slower: str
) -> Lead | None:
    """Return the shortest length from which on the whole interval is below one, or None."""
    since: int | None = None
    for length in sorted(by_length, reverse=True):
        if by_length[length].high >= 1.0:
            break
        since = length
    if since is None:
        return None
    return Lead(measure, faster, slower, since, since == min(by_length), by_length[since])
