"""What a person sees while a sweep runs: a table on a terminal, else a line per finished trial.

The time that is left comes from the seconds that trials of each width have taken; a width of which
nothing is known is taken to cost as the nearest known one, times the ratio of widths to the power
of 1.5. Widths that are not reached yet count with five points.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from interlace.launch.sweep.conducting import State
from interlace.launch.sweep.search import Line, families
from interlace.launch.sweep.trials import Trial
from interlace.trainer.observe.units import human_duration

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

POINTS_TO_COME = 5
COST_EXPONENT = 1.5
NARROWEST_SCREEN = 60


def seconds_by_width(state: State) -> dict[int, float]:
    """Return mean wall seconds of a trial by width, as far as the results tell."""
    found: dict[int, list[float]] = {}
    for trial, result in state.results.items():
        if not result.diverged:
            found.setdefault(trial.width, []).append(result.wall_seconds)
    return {width: fmean(seconds) for width, seconds in found.items()}


def estimate(width: int, known: Mapping[int, float]) -> float | None:
    """Return the seconds that a trial of a width may take, or None if nothing is known."""
    if not known:
        return None
    nearest = min(known, key=lambda other: abs(math.log(other / width)))
    return known[nearest] * (width / nearest) ** COST_EXPONENT


def trials_to_come(state: State) -> dict[int, int]:
    """Return by width how many trials are needed or, where that is open, expected."""
    request = state.space.request
    counts = dict.fromkeys(request.widths, 0)
    for trial in state.needed():
        counts[trial.width] += 1
    reached = {(line.family, line.width) for line in state.lines()}
    for family in families(request):
        for width in request.widths:
            if (family, width) not in reached:
                counts[width] += POINTS_TO_COME * request.seeds
    return counts


def seconds_left(state: State, jobs: int) -> float | None:
    """Return the seconds until a sweep ends, or None if nothing is known of its trials."""
    known = seconds_by_width(state)
    if not known:
        return None
    work = sum(n * (estimate(width, known) or 0.0) for width, n in trials_to_come(state).items())
    return work / jobs


def summary(state: State, jobs: int) -> str:
    """Say how many trials are done, how many are known of, and when it ends."""
    done = len(state.results) + len(state.failures)
    text = f"{done} of {done + sum(trials_to_come(state).values())} trials"
    crashed = f", {len(state.failures)} crashed" if state.failures else ""
    left = seconds_left(state, jobs)
    return f"{text}{crashed}, {len(state.running)} running" + (
        f", about {human_duration(left)} left" if left is not None else ""
    )


def power(log2_lr: float) -> str:
    """Return a learning rate as a power of two."""
    return f"2^{log2_lr:g}" if math.isclose(log2_lr, round(log2_lr, 2)) else f"2^{log2_lr:.2f}"


def described(trial: Trial) -> str:
    """Name a trial."""
    words = [trial.parametrisation, *trial.settings, f"width {trial.width}"]
    return "  ".join([*words, f"lr {power(trial.log2_lr)}", f"seed {trial.seed}"])


@dataclass
class Progress:
    """Shows a sweep while it runs, on the error stream.

    Attributes:
        jobs: Trials at a time.
        quiet: Whether nothing is shown.
    """

    jobs: int
    quiet: bool = False
    said: set[Trial] = field(default_factory=set[Trial])
    live: "Live | None" = None
    shown: float = 0.0

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            if console.width >= NARROWEST_SCREEN:
                self.live = Live(console=console, auto_refresh=False, transient=True)
                self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def found(self, state: State) -> None:
        """Take note of what was there already; it gets no line."""
        self.said |= {*state.results, *state.failures}
        if self.said and not self.quiet:
            print(f"{len(self.said)} trials are in the store already", file=sys.stderr)

    def show(self, state: State) -> None:
        """Show how far a sweep is."""
        new = [trial for trial in (*state.results, *state.failures) if trial not in self.said]
        self.said |= set(new)
        if self.quiet:
            return
        if self.live is not None:
            if new or time.monotonic() - self.shown > 1:
                self.shown = time.monotonic()
                self.live.update(table(state, self.jobs), refresh=True)
            return
        for trial in new:
            print(
                f"{described(trial)}  {ending(state, trial)}   {summary(state, self.jobs)}",
                file=sys.stderr,
            )


def ending(state: State, trial: Trial) -> str:
    """Say how a trial ended."""
    result = state.results.get(trial)
    if result is None:
        return "CRASHED: " + state.failures[trial].splitlines()[0]
    if result.diverged:
        return "diverged"
    return f"loss {result.loss:.4f}  {result.wall_seconds:.1f} s"


def table(state: State, jobs: int) -> "Group":
    """Draw widths by learning rates: mean losses, and how far each point is, below a summary."""
    from rich.console import Group
    from rich.table import Table

    known = state.lines()
    points = sorted({point for line in known for point in line.points})
    drawn = Table(box=None)
    drawn.add_column("width")
    for point in points:
        drawn.add_column(power(point), justify="right")
    for line in known:
        best = min((m for m in line.means.values() if m == m), default=math.nan)
        cells = [cell(state, line, point, best) for point in points]
        drawn.add_row(" ".join([name_of(line), str(line.width)]), *cells)
    return Group(summary(state, jobs), drawn)


def name_of(line: Line) -> str:
    """Name the family of a line."""
    return " ".join([line.family.parametrisation, *line.family.settings])


def cell(state: State, line: Line, point: float, best: float) -> str:
    """Return a point's mean loss, or how many of its seeds are done."""
    if point not in line.points:
        return ""
    mean = line.means.get(point)
    if mean is None:
        trials = [
            Trial(line.width, line.family.parametrisation, line.family.settings, seed, point)
            for seed in state.space.seeds
        ]
        done = sum(trial in state.results or trial in state.failures for trial in trials)
        running = any(trial in state.running for trial in trials)
        return f"[{'yellow' if running else 'dim'}]{done}/{len(trials)}[/]"
    if math.isnan(mean):
        return "[red]crashed[/]"
    if math.isinf(mean):
        return "[magenta]diverged[/]"
    return f"[bold green]{mean:.3f}[/]" if mean == best else f"{mean:.3f}"
