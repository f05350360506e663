"""What the race of `benchmarks/versus_deepspeed.py` comes to: the table, who ends in another loss
than the others, which goals are met, and a picture.

Times are those of the slowest rank. A contender that ran in several rounds has the median of them;
ratios are taken within a round, where the machine was the same for both.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from race_contenders import CONTENDERS, Contender
from race_tracks import Track
from results import Row

GIB = 2**30
AGREEMENT = {"final_loss": 1e-3, "rough_loss": 0.1}
"""Nats per token by which the losses of those who do the same may differ, in float32 and in
bfloat16: there fifty steps amplify its rounding to 2e-2, and a wrong update is off by far more.
"""

FASTER, NEAR_BOUND, NEAR_RESIDENT = 1.3, 1.1, 0.95
"""Goals: iterations against the best of DeepSpeed, exposed update against the lower bound, tokens
against all resident."""

NO_TIME = "no time was left"

Findings = Sequence[dict[str, Any]]
"""What the ranks of one contender found in one round; see `race_rank.Finding`."""


@dataclass
class Outcome:
    """What came of one contender on one track.

    Attributes:
        rounds: What its ranks found, by the number of the round; losses are in its first.
        error: Why it could not run, or not again; the latter leaves the rounds before valid.
        seconds: Of every run of it.
    """

    contender: Contender
    track: Track
    rounds: dict[int, Findings] = field(default_factory=dict[int, Findings])
    error: str = ""
    seconds: list[float] = field(default_factory=list[float])

    def slowest(self, round_: int, rows: int, name: str) -> float | None:
        """Return one time of one round, in seconds, of the rank that took longest."""
        found = [each["timings"][str(rows)][name] for each in self.rounds[round_]]
        return None if None in found else max(found)

    def median(self, rows: int, name: str) -> float | None:
        """Return the median of one time over the rounds; None where there is none."""
        return middle(self.slowest(number, rows, name) for number in self.rounds)

    def exposed(self, rows: int) -> float | None:
        """Return what an iteration takes longer than one without an update."""

        def of_one(number: int) -> float | None:
            whole = self.slowest(number, rows, "iteration")
            compute = self.slowest(number, rows, "compute")
            return None if whole is None or compute is None else whole - compute

        return middle(of_one(number) for number in self.rounds)

    def tokens_per_second(self, rows: int) -> float | None:
        """Return the tokens of all ranks per second."""
        seconds = self.median(rows, "iteration")
        return rows * self.track.length * self.ranks / seconds if seconds else None

    @property
    def ranks(self) -> int:
        """How many ran."""
        return max((len(found) for found in self.rounds.values()), default=0)

    def loss(self, name: str = "final_loss") -> float | None:
        """Return the loss in which it ended; None where that was not measured."""
        losses = (found[0][name] for found in self.rounds.values())
        return next((loss for loss in losses if loss is not None), None)

    @property
    def host_bytes(self) -> int:
        """Most memory of all ranks together."""
        sums = (sum(each["host_bytes"] for each in found) for found in self.rounds.values())
        return max(sums, default=0)

    def device_bytes(self, rows: int) -> int:
        """Most memory of one device."""
        every = (each["timings"][str(rows)] for found in self.rounds.values() for each in found)
        return max((timing["device_bytes"] for timing in every), default=0)


def middle(values: Iterable[float | None]) -> float | None:
    """Return the median of the values there are."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


# ---- rows -----------------------------------------------------------------------------------


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the table, a line for every contender and micro-batch; those that failed included."""
    lines: list[Row] = []
    apart = names_apart(outcomes)
    tracks = list(dict.fromkeys(outcome.track for outcome in outcomes))
    for track in tracks:
        of_track = [outcome for outcome in outcomes if outcome.track == track]
        for rows in track.rows:
            lines += [line(each, rows, of_track, apart) for each in in_order(of_track)]
    return lines


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return DeepSpeed's variants first, then torch, then ours."""
    engines = ("deepspeed", "fsdp2", "interlace", "attached")
    return sorted(
        outcomes,
        key=lambda each: (
            engines.index(each.contender.engine),
            each.contender.rule,
            CONTENDERS.index(each.contender),
        ),
    )


def line(outcome: Outcome, rows: int, rivals: Sequence[Outcome], apart: Sequence[str]) -> Row:
    """Return the figures of one contender with one micro-batch."""
    contender = outcome.contender
    first: dict[str, object] = {
        "model": outcome.track.name,
        "tokens per rank and step": rows * outcome.track.length,
        "contender": contender.title,
    }
    if not outcome.rounds:
        return first | {"remark": outcome.error}
    words = [contender.caveat]
    if outcome.error:
        words.append(f"{len(outcome.rounds)} rounds, then {outcome.error}")
    if contender.name in apart:
        words.insert(0, "ENDS IN ANOTHER LOSS")

    def milliseconds(name: str) -> float | str:
        seconds = outcome.median(rows, name)
        return "" if seconds is None else seconds * 1e3

    exposed, device, loss = outcome.exposed(rows), outcome.device_bytes(rows), outcome.loss()
    return first | {
        "forward ms": milliseconds("forward"),
        "backward ms": milliseconds("backward"),
        "update ms": milliseconds("update"),
        "exposed ms": "" if exposed is None else exposed * 1e3,
        "iteration ms": milliseconds("iteration"),
        "times as fast as DeepSpeed": speed_up(outcome, rows, rivals) or "",
        "tokens/s": round(outcome.tokens_per_second(rows) or 0),
        "device GiB": device / GIB if device else "",
        "host GiB": outcome.host_bytes / GIB,
        "predicted update ms": milliseconds("predicted_update"),
        "predicted exposed ms": milliseconds("predicted_exposed"),
        "lower bound ms": milliseconds("bound"),
        "loss": "" if loss is None else f"{loss:.5f}",
        "remark": "; ".join(filter(None, words)),
    }


def best_deepspeed(number: int, rows: int, outcomes: Sequence[Outcome]) -> float | None:
    """Return the shortest iteration of DeepSpeed's own variants in one round."""
    times = [
        outcome.slowest(number, rows, "iteration")
        for outcome in outcomes
        if outcome.contender.is_stock_deepspeed and number in outcome.rounds
    ]
    return min((time for time in times if time is not None), default=None)


def speed_up(outcome: Outcome, rows: int, outcomes: Sequence[Outcome]) -> float | None:
    """Return how many times faster than DeepSpeed's best variant a contender is."""

    def of_one(number: int) -> float | None:
        best = best_deepspeed(number, rows, outcomes)
        own = outcome.slowest(number, rows, "iteration")
        return best / own if best and own else None

    return middle(of_one(number) for number in outcome.rounds)


# ---- agreement ------------------------------------------------------------------------------


def names_apart(outcomes: Sequence[Outcome]) -> list[str]:
    """Return who ends in another loss than most of those with the same mathematics."""
    apart: list[str] = []
    groups = {(outcome.track.name, outcome.contender.mathematics) for outcome in outcomes}
    for track, mathematics in sorted(groups):
        if not mathematics:
            continue
        same = [
            outcome
            for outcome in outcomes
            if outcome.track.name == track and outcome.contender.mathematics == mathematics
        ]
        for name, tolerance in AGREEMENT.items():
            losses = {each.contender.name: each.loss(name) for each in same}
            apart += outliers({who: x for who, x in losses.items() if x is not None}, tolerance)
    return list(dict.fromkeys(apart))


def outliers(losses: Mapping[str, float], tolerance: float) -> list[str]:
    """Return the names whose loss is further than the tolerance from the median."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    # One of them rather than the mean of two, which would be near neither.
    usual = statistics.median_low(finite) if finite else math.nan
    # A loss that is not a number is within no tolerance.
    return [name for name, loss in losses.items() if not abs(loss - usual) <= tolerance]


# ---- goals ----------------------------------------------------------------------------------


def goals(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the three goals on every track, each met, missed or without figures."""
    said: list[str] = []
    for track in dict.fromkeys(outcome.track for outcome in outcomes):
        by_name = {each.contender.name: each for each in outcomes if each.track == track}
        few, many = track.rows[0], track.rows[-1]
        optimal, resident = by_name.get("optimal"), by_name.get("resident")
        exposed = optimal.exposed(few) if optimal else None
        bound = optimal.median(few, "bound") if optimal else None
        faster = speed_up(optimal, few, list(by_name.values())) if optimal else None
        rates = [each.tokens_per_second(many) if each else None for each in (optimal, resident)]
        said += [
            goal(
                f"{track.name}, {few * track.length} tokens: exposed update of optimal is "
                f"{{:.2f}} of the lower bound, at most {NEAR_BOUND} wanted",
                exposed / bound if exposed is not None and bound else None,
                lambda value: value <= NEAR_BOUND,
            ),
            goal(
                f"{track.name}, {few * track.length} tokens: optimal is {{:.2f}} times as fast as "
                f"the best of DeepSpeed, {FASTER} wanted",
                faster,
                lambda value: value >= FASTER,
            ),
            goal(
                f"{track.name}, {many * track.length} tokens: optimal has {{:.3f}} of the tokens/s "
                f"of all resident, {NEAR_RESIDENT} wanted",
                rates[0] / rates[1] if rates[0] and rates[1] else None,
                lambda value: value >= NEAR_RESIDENT,
            ),
        ]
    return said


def goal(words: str, value: float | None, met: Callable[[float], bool]) -> str:
    """Return a goal with its figure and whether it is met."""
    if value is None:
        return f"NOT JUDGED  {words.format(math.nan)}: who it needs did not run"
    return f"{'MET' if met(value) else 'MISSED'}  {words.format(value)}"


# ---- picture --------------------------------------------------------------------------------

PARTS = (("forward", "#4c78a8"), ("backward", "#9ecae9"), ("exposed update", "#e45756"))


def draw(outcomes: Sequence[Outcome], caption: str) -> Figure:
    """Return a picture: for every track and micro-batch a bar per contender, forward, backward, and
    what the update adds to them.
    """
    panels = [
        (track, rows)
        for track in dict.fromkeys(outcome.track for outcome in outcomes)
        for rows in track.rows
    ]
    bars = max(sum(o.track == track for o in outcomes) for track, _ in panels)
    figure = Figure(figsize=(6.2 * len(panels), 1.6 + 0.33 * bars), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (track, rows) in zip(axes, panels, strict=True):
        ordered = in_order([o for o in outcomes if o.track == track])
        for place, outcome in enumerate(ordered):
            left = 0.0
            for (name, color), width in zip(PARTS, parts_of(outcome, rows), strict=True):
                axis.barh(place, width, left=left, color=color, label=name if not place else "")
                left += width
            if not outcome.rounds:
                axis.text(0, place, " did not run", va="center", fontsize=8, color="#888888")
        axis.set_yticks(range(len(ordered)), [o.contender.title for o in ordered], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds per iteration")
        axis.set_title(f"{track.name}, {rows * track.length} tokens per rank and step", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=10)
    return figure


def parts_of(outcome: Outcome, rows: int) -> tuple[float, float, float]:
    """Return the milliseconds of forward, backward and exposed update, which add up to an
    iteration; the passes share what an iteration takes without its update.
    """
    forward, backward = outcome.median(rows, "forward"), outcome.median(rows, "backward")
    whole = outcome.median(rows, "iteration")
    if forward is None or backward is None or whole is None:
        return 0.0, 0.0, 0.0
    exposed = outcome.exposed(rows)
    # Who cannot leave the update out is drawn with all of what the passes alone do not take.
    shown = max(0.0, whole - forward - backward if exposed is None else exposed)
    share = (whole - shown) / (forward + backward)
    return forward * share * 1e3, backward * share * 1e3, shown * 1e3
