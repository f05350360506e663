"""Slopes over the width, what they may be, and which module is at fault.

A size that goes as width**slope is fitted on logarithms. Where a rule is missing, slopes are off by
a half or by one, and in the later steps by more; the bounds lie between that and what chance and
finite widths do. Outputs (head,
router, energy, the shared rows of a state space) have bounds of their own: what they start with at
random must vanish against what they learn, so it falls with the root of the width, or is zero.

One wrong module upsets all behind it. The one at fault is the first that is off in the order of
cause: what comes out of modules before any update, from the first to the last; gradients, from the
last to the first; the first update; and only then what the steps have led to.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from interlace.trainer.mup.check.measuring import OBJECTIVE, Key, Series, Statistic
from interlace.trainer.mup.manifest import Manifest

Phase = Literal["start", "late"]
"""In the first step, before any update; or the mean over the second half of the steps."""

Bounds = tuple[float, float]

HIDDEN: Mapping[tuple[Statistic, Phase], Bounds] = {
    ("size", "start"): (-0.25, 0.25),
    ("size", "late"): (-0.5, 0.5),
    ("change", "late"): (-0.5, 0.5),
    ("gradient", "start"): (-math.inf, 0.5),
    ("gradient", "late"): (-math.inf, 0.7),
    ("update", "start"): (-math.inf, 0.25),
    ("update", "late"): (-math.inf, 0.5),
    ("clipped", "start"): (-math.inf, 1.0),
    ("clipped", "late"): (-1.0, 1.0),
}
"""Lowest and highest slope of what is as large at every width. What learns too little in wide
models is seen in its change; a gradient may fall for a while where it goes through an output.
"""

OUTPUT: Mapping[tuple[Statistic, Phase], Bounds] = {
    ("size", "start"): (-math.inf, -0.25),
    ("size", "late"): (-math.inf, 0.5),
    ("change", "late"): (-0.75, 0.5),
    ("gradient", "start"): (-math.inf, 0.5),
    ("gradient", "late"): (-math.inf, 0.7),
    ("update", "start"): (-math.inf, 0.25),
    ("update", "late"): (-math.inf, 0.5),
    ("clipped", "start"): (-math.inf, 1.0),
    ("clipped", "late"): (-math.inf, 1.0),
}
"""The same of outputs, whose random part falls."""

BEHIND: Mapping[tuple[Statistic, Phase], Bounds] = {
    **OUTPUT,
    ("size", "start"): (-math.inf, 0.25),
    ("change", "late"): (-math.inf, 0.5),
}
"""The same of what has no side that grows: it is fed with outputs."""

REPORTED: Mapping[tuple[Statistic, Phase], Bounds] = {
    ("size", "start"): (-math.inf, 0.5),
    ("size", "late"): (-math.inf, 0.6),
}
"""The same of what an objective tells of itself: the gradient of an energy."""

CAUSES: Sequence[tuple[Phase, Sequence[Statistic]]] = (
    ("start", ("size", "gradient", "clipped", "update")),
    ("late", ("clipped", "update", "change", "size", "gradient")),
)
"""The order of cause."""

FALLS = -0.5
"""Slope of a gradient below which its share of clipped coordinates says nothing."""

SEEN = 0.002
"""Shares of clipped coordinates below this at every width say nothing."""


@dataclass(frozen=True)
class Slope:
    """One fitted slope.

    Attributes:
        title: Of the module or parameter.
        statistic: What was measured.
        phase: When.
        slope: Exponent of the width.
        lowest: What it may be at least.
        highest: What it may be at most.
        sizes: Means over the seeds, one per width.
    """

    title: str
    statistic: Statistic
    phase: Phase
    slope: float
    lowest: float
    highest: float
    sizes: tuple[float, ...]

    @property
    def module(self) -> str:
        """Title of the module: that of its weight without the word."""
        name, bracket, rows = self.title.partition("[")
        return f"{name.removesuffix('.weight')}{bracket}{rows}"

    @property
    def passes(self) -> bool:
        """Whether it lies within its bounds."""
        return self.lowest <= self.slope <= self.highest


@dataclass(frozen=True)
class Verdict:
    """What a coordinate check found.

    Attributes:
        widths: From the narrowest.
        slopes: All of them, in the order of cause.
        ended_early: Widths at which a step was not finite.
    """

    widths: tuple[int, ...]
    slopes: tuple[Slope, ...]
    ended_early: tuple[int, ...]

    @property
    def failures(self) -> tuple[Slope, ...]:
        """Slopes out of bounds, the likeliest cause first."""
        return tuple(slope for slope in self.slopes if not slope.passes)

    @property
    def passes(self) -> bool:
        """Whether everything keeps its size."""
        return not self.failures and not self.ended_early

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules, in the order in which they run; then what has parameters only."""
        ran = [slope.module for slope in self.slopes if slope.statistic == "size"]
        return tuple(dict.fromkeys([*ran, *(slope.module for slope in self.slopes)]))

    @property
    def at_fault(self) -> str | None:
        """The module or parameter that is the likeliest cause, or None."""
        return self.failures[0].title if self.failures else None


def judge(series: Mapping[tuple[int, int], Series], manifest: Manifest, steps: int) -> Verdict:
    """Fit all slopes.

    Args:
        series: What was measured, by width and seed.
        manifest: Of the widest model, with all rules; it says which modules are outputs.
        steps: How many each trial should have taken.
    """
    widths = tuple(sorted({width for width, _ in series}))
    seeds = sorted({seed for _, seed in series})
    keys = list(series[widths[0], seeds[0]])
    roles = {entry.title: entry.role for entry in manifest.entries}
    found: list[Slope] = []
    for phase, statistics in CAUSES:
        for statistic in statistics:
            named = [key for key in keys if key.statistic == statistic]
            # What is wrong behind a module comes back through it: the last one is the first cause.
            for key in reversed(named) if statistic == "gradient" else named:
                sizes = tuple(
                    typical([series[width, seed] for seed in seeds], key, phase, steps)
                    for width in widths
                )
                if (bounds := bounds_of(key, roles, phase)) and tells(statistic, sizes):
                    slope = slope_of(widths, sizes, SEEN if statistic == "clipped" else 0.0)
                    found.append(Slope(key.title, statistic, phase, slope, *bounds, sizes))
    short = (
        width
        for width in widths
        if any(len(longest(series[width, seed])) < steps for seed in seeds)
    )
    return Verdict(widths, tuple(without_followers(found)), tuple(short))


def without_followers(slopes: Sequence[Slope]) -> Iterator[Slope]:
    """Yield slopes, but for shares of clipped coordinates that fall because the gradient does: a
    threshold is wrong where it clips less of gradients that keep their size.
    """
    small = {
        (each.title, each.phase)
        for each in slopes
        if each.statistic == "gradient" and each.slope < FALLS
    }
    for each in slopes:
        if each.statistic != "clipped" or (each.title, each.phase) not in small:
            yield each


def longest(series: Series) -> list[float]:
    """Return the longest of all series: a step that is not finite ends them."""
    return max(series.values(), key=len, default=[])


def typical(trials: Sequence[Series], key: Key, phase: Phase, steps: int) -> float:
    """Return the mean over seeds, and over the steps of a phase."""
    found: list[float] = []
    for trial in trials:
        values = trial.get(key, [])
        found += values[:1] if phase == "start" else values[steps // 2 :]
    return float(np.mean(np.abs(found))) if found else math.nan


def bounds_of(key: Key, roles: Mapping[str, str], phase: Phase) -> Bounds | None:
    """Return what a slope may be; None where nothing is known of it."""
    role = roles.get(key.title) or roles.get(weight_of(key.title), "hidden")
    table = {"readout": OUTPUT, "finite": BEHIND}.get(role, HIDDEN)
    if key.title.startswith(OBJECTIVE):
        table = REPORTED
    return table.get((key.statistic, phase))


def weight_of(title: str) -> str:
    """Return the title of a module's weight: `NAME.weight`, `NAME.weight[ROWS]`."""
    name, bracket, rows = title.partition("[")
    return f"{name}.weight{bracket}{rows}"


def tells(statistic: Statistic, sizes: Sequence[float]) -> bool:
    """Whether sizes say anything: they are there and not zero."""
    if statistic == "clipped":
        return max(sizes) > SEEN
    return all(math.isfinite(size) and size > 0.0 for size in sizes)


def slope_of(widths: Sequence[int], sizes: Sequence[float], least: float) -> float:
    """Return the exponent of the width, by least squares on logarithms; smaller sizes count as
    `least`.
    """
    logarithms = np.log2(np.maximum(sizes, least))
    return float(np.polyfit(np.log2(widths), logarithms, 1)[0])
