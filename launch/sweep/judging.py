"""From results to verdicts: one per family of widths, and which settings won."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from interlace.launch.sweep.conducting import State
from interlace.launch.sweep.search import Family, Line, families, trials_of
from interlace.launch.sweep.trials import Trial
from interlace.trainer.mup.transfer import CONTROL_DRIFT, DRIFT_LIMIT, Transfer, Valley, judge


@dataclass(frozen=True)
class Judged:
    """A family with its valleys and the verdict on them.

    Attributes:
        family: The family.
        valleys: One per width that has any point with all its seeds, ascending.
        transfer: The verdict; None without any valley.
        crashed: Trials that crashed.
        complete: Whether all widths were tried as far as needed.
    """

    family: Family
    valleys: tuple[Valley, ...]
    transfer: Transfer | None
    crashed: int
    complete: bool

    @property
    def bracketed(self) -> bool:
        """Whether every width has an optimum inside of what was tried, and nothing crashed."""
        known = self.transfer is not None and self.transfer.bracketed
        return known and self.complete and not self.crashed

    @property
    def passes(self) -> bool:
        """Whether the learning rate transfers; with one width, whether its optimum is known."""
        if self.transfer is None or not self.bracketed:
            return False
        return self.transfer.passes or len(self.valleys) == 1

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.crashed:
            return f"unknown: {self.crashed} trials crashed"
        if self.transfer is None or not self.complete:
            return "unknown: not all widths were tried"
        if not self.bracketed:
            return "not bracketed: " + edges(self.valleys, self.transfer)
        if len(self.valleys) == 1:
            return "one width: there is nothing to transfer to"
        if self.family.parametrisation == "standard":
            return control_words(self.transfer)
        return transfer_words(self.transfer)


def edges(valleys: Sequence[Valley], transfer: Transfer) -> str:
    """Name the widths whose lowest loss is at an end of what was tried."""
    found: list[str] = []
    for valley, optimum in zip(valleys, transfer.optima, strict=True):
        if optimum.log2_lr is not None:
            continue
        if optimum.lowest is None:
            found.append(f"at width {valley.width} every learning rate diverged")
            continue
        end = "lowest" if optimum.lowest == min(valley.losses) else "highest"
        found.append(f"at width {valley.width} the best is the {end} that was tried")
    return ", ".join(found)


def transfer_words(transfer: Transfer) -> str:
    """Say whether the learning rate transfers, and what stands against it."""
    if transfer.passes:
        return "the learning rate transfers"
    reasons: list[str] = []
    if not transfer.drift_passes:
        reasons.append(f"the optimum moves by more than {DRIFT_LIMIT:g} octaves per doubling")
    if not transfer.regret_passes:
        reasons.append("transferring costs more than is allowed")
    return "the learning rate does not transfer: " + " and ".join(reasons)


def control_words(transfer: Transfer) -> str:
    """Say whether the standard parametrisation fails as it must for the test to mean anything."""
    if transfer.is_control:
        return f"the control drifts, by {CONTROL_DRIFT:g} octaves per doubling or more"
    return f"the control does not drift by {CONTROL_DRIFT:g}: this sweep tells little about muP"


def judged(state: State) -> list[Judged]:
    """Return the verdict on every family of a sweep."""
    known = state.lines()
    return [verdict_on(family, known, state) for family in families(state.space.request)]


def verdict_on(family: Family, known: Sequence[Line], state: State) -> Judged:
    """Return the verdict on one family."""
    mine = [line for line in known if line.family == family]
    valleys = tuple(valley for line in mine if (valley := valley_of(line, state)).losses)
    crashed = sum(
        trial in state.failures for line in mine for trial in trials_of(line, state.space.seeds)
    )
    widths = state.space.request.widths
    complete = len(valleys) == len(widths) and all(line.settled for line in mine)
    return Judged(family, valleys, judge(valleys) if valleys else None, crashed, complete)


def valley_of(line: Line, state: State) -> Valley:
    """Return the losses of one width, of points with all their seeds."""
    losses: dict[float, tuple[float, ...]] = {}
    clipped: dict[float, float] = {}
    for point in line.points:
        results = [
            state.results.get(
                Trial(line.width, line.family.parametrisation, line.family.settings, seed, point)
            )
            for seed in state.space.seeds
        ]
        whole = [result for result in results if result is not None]
        if len(whole) < len(results):
            continue
        losses[point] = tuple(result.loss for result in whole)
        shares = [each.clip_fraction for each in whole if each.clip_fraction is not None]
        if shares:
            clipped[point] = fmean(shares)
    return Valley(line.width, losses, clipped)


def winner(verdicts: Sequence[Judged]) -> Judged | None:
    """Return the family under muP with the lowest loss at the widest width, of those whose optima
    are all known.
    """
    known = [each for each in verdicts if each.family.parametrisation == "mup" and each.bracketed]
    return min(known, key=widest_loss, default=None)


def against_standard(verdicts: Sequence[Judged]) -> list[tuple[Judged, float]]:
    """Return every family under muP that has a counterpart without it, both with all optima, and
    by how many nats its lowest loss at the widest width is above the counterpart's: a transfer that
    costs loss is no gain.
    """
    known = {each.family: each for each in verdicts if each.bracketed}
    pairs = [
        (each, known.get(Family("standard", family.settings)))
        for family, each in known.items()
        if family.parametrisation == "mup"
    ]
    return [(m, widest_loss(m) - widest_loss(other)) for m, other in pairs if other is not None]


def widest_loss(each: Judged) -> float:
    """Return the lowest mean loss of a family's widest width."""
    return each.transfer.optima[-1].loss if each.transfer else math.inf
