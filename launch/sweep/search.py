"""Which trials are needed next: a pure function of what is known.

The narrowest width is tried at the whole grid, all seeds. Around the lowest mean loss two points on
each side are needed for a parabola, unless the first of them is already far above; where one is
missing the grid grows, up to six octaves beyond its ends. A wider model begins with three points
around the optimum of the next narrower one, and with the narrowest one's learning rate, since what
that costs it is the question; then it grows in the same way. What is needed follows from finished
points only, so it does not depend on the order in which trials end.

A trial that crashed gives no loss; its point counts by its other seeds, and without any it is a
wall beyond which nothing is looked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from interlace.launch.sweep.request import Ladder, Parametrisation, Request
from interlace.launch.sweep.trials import Trial
from interlace.trainer.mup.transfer import in_valley, lowest_point, transferred_rate

SIDE_POINTS = 2
"""Points on each side of the lowest one that a vertex is fitted through."""

Outcomes = Mapping[Trial, float | None]
"""Loss of every finished trial, infinite if it diverged, None if it crashed."""


@dataclass(frozen=True)
class Family:
    """Models that differ in nothing but their width."""

    parametrisation: Parametrisation
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One width of a family, and how far its learning rates are tried.

    Attributes:
        family: The family.
        width: Width of the model.
        points: Learning rates (log2) that are needed, as far as that is known, ascending.
        settled: Whether no more are.
        means: Mean losses of the points that are done; NaN where every seed crashed.
    """

    family: Family
    width: int
    points: tuple[float, ...]
    settled: bool
    means: Mapping[float, float]


def families(request: Request) -> tuple[Family, ...]:
    """Return the families of a sweep."""
    return tuple(
        Family(parametrisation, settings)
        for settings in request.grid
        for parametrisation in request.parametrisations
    )


def needed(request: Request, seeds: Sequence[int], outcomes: Outcomes) -> list[Trial]:
    """Return the trials that are needed and not done, cheap ones first; none when all is known."""
    return sorted(
        trial
        for line in lines(request, seeds, outcomes)
        for trial in trials_of(line, seeds)
        if trial not in outcomes
    )


def lines(request: Request, seeds: Sequence[int], outcomes: Outcomes) -> list[Line]:
    """Return every width of every family, as far as it can be known what it needs."""
    return [
        line for family in families(request) for line in lines_of(family, request, seeds, outcomes)
    ]


def lines_of(
    family: Family, request: Request, seeds: Sequence[int], outcomes: Outcomes
) -> Iterator[Line]:
    """Yield the widths of one family, the narrowest first, up to the first that is not settled."""
    ladder = request.ladder
    start = set(ladder.grid)
    taken: set[float] = set()
    for width in request.widths:
        line = settle(Line(family, width, tuple(sorted(start)), False, {}), ladder, seeds, outcomes)
        yield line
        if not line.settled:
            return
        lowest = lowest_of(line.means)
        if lowest is None:
            start = set(ladder.grid)
            continue
        if not taken and width == request.widths[0]:
            taken = beside(transferred_rate(finished(line.means)), ladder)
        start = around(lowest, ladder) | taken


def beside(rate: float | None, ladder: Ladder) -> set[float]:
    """Return the rungs on both sides of a learning rate (log2): wider models need them to tell what
    it costs.
    """
    if rate is None:
        return set()
    below = [rung for rung in ladder.rungs if rung <= rate]
    above = [rung for rung in ladder.rungs if rung >= rate]
    return {*below[-1:], *above[:1]}


def settle(line: Line, ladder: Ladder, seeds: Sequence[int], outcomes: Outcomes) -> Line:
    """Let a line grow as far as its finished points tell."""
    points = set(line.points)
    while True:
        means = {
            point: mean
            for point in sorted(points)
            if (mean := mean_of(line, point, seeds, outcomes)) is not None
        }
        grown = set[float]() if len(means) < len(points) else growth(means, ladder)
        if not grown:
            settled = len(means) == len(points)
            return Line(line.family, line.width, tuple(sorted(points)), settled, means)
        points |= grown


def mean_of(line: Line, point: float, seeds: Sequence[int], outcomes: Outcomes) -> float | None:
    """Return the mean loss of a point; None while a seed is not done, NaN if all crashed."""
    trials = [trial_of(line, point, seed) for seed in seeds]
    if not all(trial in outcomes for trial in trials):
        return None
    losses = [loss for trial in trials if (loss := outcomes[trial]) is not None]
    return fmean(losses) if losses else math.nan


def growth(means: Mapping[float, float], ladder: Ladder) -> set[float]:
    """Return the points that a line needs besides those that are done."""
    lowest = lowest_of(means)
    if lowest is None:
        # Everything diverged: what is left to try is smaller.
        below = ladder.rungs.index(min(means)) - 1
        walled = math.isnan(means[min(means)])
        return set() if below < 0 or walled else {ladder.rungs[below]}
    return side(lowest, means, ladder, -1) | side(lowest, means, ladder, +1)


def side(lowest: float, means: Mapping[float, float], ladder: Ladder, way: int) -> set[float]:
    """Return the next point that is needed on one side of the lowest one, if any."""
    at = ladder.rungs.index(lowest)
    for _ in range(SIDE_POINTS):
        at += way
        if not 0 <= at < len(ladder.rungs):
            return set()
        point = ladder.rungs[at]
        if point not in means:
            return {point}
        if not in_valley(means[point], means[lowest]):
            return set()
    return set()


def around(lowest: float, ladder: Ladder) -> set[float]:
    """Return a rung and its two neighbours."""
    at = ladder.rungs.index(lowest)
    return set(ladder.rungs[max(0, at - 1) : at + 2])


def lowest_of(means: Mapping[float, float]) -> float | None:
    """Return the point of the lowest loss; None if all diverged or crashed."""
    return lowest_point(finished(means))


def finished(means: Mapping[float, float]) -> dict[float, float]:
    """Return the points that did not crash."""
    return {point: mean for point, mean in means.items() if not math.isnan(mean)}


def trials_of(line: Line, seeds: Sequence[int]) -> list[Trial]:
    """Return the trials of a line, done or not."""
    return [trial_of(line, point, seed) for point in line.points for seed in seeds]


def trial_of(line: Line, point: float, seed: int) -> Trial:
    """Return one trial of a line."""
    family = line.family
    return Trial(line.width, family.parametrisation, family.settings, seed, point)
