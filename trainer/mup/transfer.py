"""Do hyperparameters transfer? Loss over learning rate at several widths, turned into numbers.

At every width the loss over log2 of the learning rate is a valley. Its optimum is the vertex of a
parabola through the points next to the lowest one. Three questions follow (Yang et al. 2022, arXiv
2203.03466; Lingle 2024, arXiv 2404.05728): does the optimum move with the width (drift), what does
it cost to take the narrowest model's learning rate to a wider one (regret), and is a wider model
better at that learning rate? Everything here is a pure function of losses; nothing is trained. A
loss that diverged is infinite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np

VALLEY = 0.1
"""A point belongs to the valley while its loss is above the lowest by at most this share."""

MOST_FITTED = 5
"""Points of one parabola at most: further ones tell of the slopes, which are no parabola's."""

DRIFT_LIMIT = 0.15
"""Octaves of the optimum per doubling of the width that still count as transfer."""

CONTROL_DRIFT = -0.5
"""Drift that the standard parametrisation shows at least, where the test has power."""

REGRET_LIMIT = 0.005
"""Share of the loss that transferring may cost, if the seeds do not spread more."""

RESAMPLES = 1000
"""Draws of seeds behind an interval; it holds the middle 95% of them."""

Losses = Mapping[float, Sequence[float]]
"""Losses (nats per token) of every seed by log2 of the learning rate."""


@dataclass(frozen=True)
class Valley:
    """The losses at one width.

    Attributes:
        width: Width of the model.
        losses: Of every learning rate, one loss per seed, in the same order of seeds everywhere.
        clip_fractions: Share of coordinates that were clipped, by log2 of the learning rate, where
            anything is clipped.
    """

    width: int
    losses: Losses
    clip_fractions: Mapping[float, float]

    @property
    def means(self) -> dict[float, float]:
        """Mean loss over the seeds, ascending by learning rate; infinite if any diverged."""
        return {rate: fmean(self.losses[rate]) for rate in sorted(self.losses)}


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one width.

    Attributes:
        width: Width of the model.
        log2_lr: Vertex of the parabola; None where the lowest point is at an edge or all diverged.
        lowest: log2 of the measured learning rate with the lowest mean loss, None if all diverged.
        loss: That loss.
        spread: Standard deviation of its seeds; 0 with one seed.
        low: Lower end of the interval of the vertex over seeds.
        high: Upper end.
        clip_fraction: Share of coordinates clipped there, if anything is.
    """

    width: int
    log2_lr: float | None
    lowest: float | None
    loss: float
    spread: float
    low: float | None
    high: float | None
    clip_fraction: float | None


@dataclass(frozen=True)
class Regret:
    """What taking the narrowest model's learning rate to one width costs.

    Attributes:
        width: Width of the model.
        log2_lr: log2 of the learning rate that is taken there.
        loss: Mean loss with it; infinite if it diverged. See `loss_above`.
        best: Lowest mean loss of this width.
        relative: What is lost, as a share of the lowest.
        allowed: What may be lost: 0.5%, or two standard deviations over seeds, as a share.
    """

    width: int
    log2_lr: float
    loss: float
    best: float
    relative: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether it costs no more than is allowed."""
        return self.relative <= self.allowed


@dataclass(frozen=True)
class Transfer:
    """The verdict on one family of widths.

    Attributes:
        optima: Of every width, ascending.
        drift: Octaves of the optimum per doubling of the width; None unless two or more widths
            have an optimum and none is without.
        drift_low: Lower end of its interval over seeds.
        drift_high: Upper end.
        regrets: Of every width but the narrowest.
        wider_is_better: Whether every wider model has a lower loss at the transferred learning
            rate; None with one width.
    """

    optima: tuple[Optimum, ...]
    drift: float | None
    drift_low: float | None
    drift_high: float | None
    regrets: tuple[Regret, ...]
    wider_is_better: bool | None

    @property
    def bracketed(self) -> bool:
        """Whether every width has an optimum with measured points on both sides."""
        return all(optimum.log2_lr is not None for optimum in self.optima)

    @property
    def drift_passes(self) -> bool:
        """Whether the optimum stays where it is."""
        return self.drift is not None and abs(self.drift) <= DRIFT_LIMIT

    @property
    def regret_passes(self) -> bool:
        """Whether transferring costs next to nothing at any width."""
        return bool(self.regrets) and all(regret.passes for regret in self.regrets)

    @property
    def passes(self) -> bool:
        """Whether the learning rate transfers: neither drift nor regret."""
        return self.bracketed and self.drift_passes and self.regret_passes

    @property
    def is_control(self) -> bool:
        """Whether the optimum falls as it must without muP, so that the test has power."""
        return self.drift is not None and self.drift <= CONTROL_DRIFT


def lowest_point(means: Mapping[float, float]) -> float | None:
    """Return the learning rate (log2) of the lowest finite mean; of equal ones the smaller."""
    finite = [(loss, rate) for rate, loss in means.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def transferred_rate(means: Mapping[float, float]) -> float | None:
    """Return the learning rate (log2) that a width hands on: its vertex; the lowest point where
    there is none.
    """
    at = vertex(means)
    return lowest_point(means) if at is None else at


def in_valley(loss: float, lowest: float) -> bool:
    """Whether a loss is low enough to tell where the optimum is."""
    return math.isfinite(loss) and loss <= lowest + VALLEY * abs(lowest)


@dataclass(frozen=True)
class Parabola:
    """`curvature x^2 + slope x + height` with x counted from `middle`; it opens upwards."""

    middle: float
    curvature: float
    slope: float
    height: float

    @property
    def vertex(self) -> float:
        """Where it is lowest."""
        return self.middle - self.slope / (2 * self.curvature)

    def at(self, place: float) -> float:
        """Return its value."""
        offset = place - self.middle
        return (self.curvature * offset + self.slope) * offset + self.height


@dataclass(frozen=True)
class Bowl:
    """The bottom of a valley.

    Attributes:
        parabola: Loss over log2 of the learning rate.
        low: Neighbour of the lowest point below it.
        high: Neighbour above it.
    """

    parabola: Parabola
    low: float
    high: float

    @property
    def vertex(self) -> float:
        """Where it is deepest, between the neighbours."""
        return min(max(self.parabola.vertex, self.low), self.high)


def bowl_of(means: Mapping[float, float]) -> Bowl | None:
    """Return the bottom of a valley.

    A parabola by least squares through the lowest point, its two neighbours and up to two more
    that are nearest to it and in the valley. Without neighbours there is no curvature, so one that
    is far above, or diverged, counts as if it were at the rim of the valley: further up the slope
    is no parabola's, and would push the vertex away from itself.

    Args:
        means: Mean losses by log2 of the learning rate.

    Returns:
        None if the lowest point is at an edge or nothing is finite.
    """
    rates = sorted(means)
    lowest = lowest_point(means)
    if lowest is None:
        return None
    place = rates.index(lowest)
    if place in (0, len(rates) - 1):
        return None
    low, high = rates[place - 1], rates[place + 1]
    rim = means[lowest] + VALLEY * abs(means[lowest])
    near = sorted(rates, key=lambda rate: (abs(rate - lowest), rate))
    more = [
        rate
        for rate in near
        if rate not in (low, lowest, high) and in_valley(means[rate], means[lowest])
    ]
    fitted = [low, lowest, high, *more[: MOST_FITTED - 3]]
    found = parabola_through(fitted, [min(means[rate], rim) for rate in fitted])
    return None if found is None else Bowl(found, low, high)


def vertex(means: Mapping[float, float]) -> float | None:
    """Return the learning rate (log2) at which a valley is deepest, or None if the lowest point is
    at an edge or nothing is finite.
    """
    bowl = bowl_of(means)
    return None if bowl is None else bowl.vertex


def loss_above(means: Mapping[float, float], rate: float) -> float | None:
    """Return how far (nats) the loss at a learning rate (log2) is above the optimum; None outside
    of what was measured.

    Between the neighbours of the lowest point it is the parabola that says so, which the optimum
    is the vertex of. Further out it is measured losses, and straight lines between them. Nearest to
    a learning rate that diverged it is infinite.
    """
    rates, lowest = sorted(means), lowest_point(means)
    if lowest is None or not rates[0] <= rate <= rates[-1]:
        return None
    if math.isinf(means[min(rates, key=lambda each: abs(each - rate))]):
        return math.inf
    bowl = bowl_of(means)
    if bowl is not None and bowl.low <= rate <= bowl.high:
        return bowl.parabola.at(rate) - bowl.parabola.at(bowl.vertex)
    losses = [means[each] for each in rates]
    return float(np.interp(rate, rates, losses)) - means[lowest]


def parabola_through(rates: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """Return the parabola by least squares through three or more points, or None if it opens
    downwards.
    """
    middle = fmean(rates)
    offsets = np.asarray(rates, dtype=np.float64) - middle
    found = np.polyfit(offsets, np.asarray(losses, dtype=np.float64), 2)
    curvature, slope, height = (float(each) for each in found)
    return Parabola(middle, curvature, slope, height) if curvature > 0 else None


def slope(widths: Sequence[float], rates: Sequence[float]) -> float:
    """Return octaves of learning rate per doubling of the width, by least squares."""
    octaves = np.log2(np.asarray(widths, dtype=np.float64))
    return float(np.polyfit(octaves, np.asarray(rates, dtype=np.float64), 1)[0])


def resampled_vertices(valley: Valley, seed: int) -> list[float]:
    """Return the vertex of every draw of seeds with replacement, `RESAMPLES` in number.

    A draw whose lowest point is at an edge counts with that point: it is at least so far out.
    """
    generator = np.random.default_rng([seed, valley.width])
    rates = sorted(valley.losses)
    table = np.array([list(valley.losses[rate]) for rate in rates], dtype=np.float64)
    found: list[float] = []
    cache: dict[tuple[int, ...], float] = {}
    for _ in range(RESAMPLES):
        drawn = tuple(sorted(generator.integers(table.shape[1], size=table.shape[1]).tolist()))
        if drawn not in cache:
            means = dict(zip(rates, map(float, table[:, drawn].mean(axis=1)), strict=True))
            at = vertex(means)
            edge = lowest_point(means)
            cache[drawn] = at if at is not None else edge if edge is not None else math.nan
        found.append(cache[drawn])
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the middle 95% of the finite values."""
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def optimum_of(valley: Valley, seed: int = 0) -> Optimum:
    """Return the optimum of one width, with its interval over seeds."""
    means = valley.means
    lowest = lowest_point(means)
    if lowest is None:
        return Optimum(valley.width, None, None, math.inf, 0.0, None, None, None)
    seeds = valley.losses[lowest]
    at = vertex(means)
    low = high = None
    if at is not None and len(seeds) > 1:
        low, high = interval(resampled_vertices(valley, seed))
    return Optimum(
        width=valley.width,
        log2_lr=at,
        lowest=lowest,
        loss=means[lowest],
        spread=stdev(seeds) if len(seeds) > 1 else 0.0,
        low=low,
        high=high,
        clip_fraction=valley.clip_fractions.get(lowest),
    )


def judge(valleys: Sequence[Valley], seed: int = 0) -> Transfer:
    """Return the verdict on the widths of one family.

    Args:
        valleys: One per width.
        seed: Fixes the draws behind the intervals.
    """
    ordered = sorted(valleys, key=lambda valley: valley.width)
    optima = tuple(optimum_of(valley, seed) for valley in ordered)
    rates = [optimum.log2_lr for optimum in optima if optimum.log2_lr is not None]
    drift = low = high = None
    if len(ordered) > 1 and len(rates) == len(ordered):
        widths = [valley.width for valley in ordered]
        drift = slope(widths, rates)
        if all(len(next(iter(valley.losses.values()))) > 1 for valley in ordered):
            draws = zip(*(resampled_vertices(valley, seed) for valley in ordered), strict=True)
            low, high = interval([slope(widths, draw) for draw in draws])
    return Transfer(optima, drift, low, high, regrets_of(ordered, optima), better(ordered, optima))


def regrets_of(valleys: Sequence[Valley], optima: Sequence[Optimum]) -> tuple[Regret, ...]:
    """Return what the narrowest model's learning rate costs at every wider one where it was
    tried.
    """
    taken = transferred_rate(valleys[0].means)
    if taken is None:
        return ()
    found: list[Regret] = []
    for valley, optimum in zip(valleys[1:], optima[1:], strict=True):
        above = loss_above(valley.means, taken)
        if above is None or optimum.lowest is None:
            continue
        best = optimum.loss
        allowed = max(REGRET_LIMIT, 2 * optimum.spread / best)
        found.append(Regret(valley.width, taken, best + above, best, above / best, allowed))
    return tuple(found)


def better(valleys: Sequence[Valley], optima: Sequence[Optimum]) -> bool | None:
    """Whether every wider model has a lower loss at the narrowest one's learning rate; None where
    that is not known.
    """
    taken = transferred_rate(valleys[0].means) if len(valleys) > 1 else None
    if taken is None:
        return None
    above = [loss_above(valley.means, taken) for valley in valleys]
    losses = [
        optimum.loss + extra
        for optimum, extra in zip(optima, above, strict=True)
        if extra is not None
    ]
    if len(losses) < len(valleys):
        return None
    return all(wide < narrow for narrow, wide in pairwise(losses))
