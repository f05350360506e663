"""What happened on each lane, or would: as numbers, as a trace for a browser, as a picture.

The simulator predicts timelines and the optimizer measures them; both have this one form. Traces
are in Chrome's format (open them in Perfetto), pictures are Gantt charts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

LANES = ("h2d", "device", "d2h", "cpu")
LANE_TITLES = {
    "h2d": "host to device",
    "device": "device updates",
    "d2h": "device to host",
    "cpu": "CPU updates",
}
COLOURS = {
    "copy in": "#4c78a8",
    "copy out": "#72b7b2",
    "update": "#e45756",
    "weights": "#f2a541",
    "gradient": "#b8a2ca",
    "gradient sum": "#8c6bb1",
    "late gradients": "#b8a2ca",
}

BACKWARD_COLOUR = "#e8e8e8"
"""Behind what runs beside backward."""

BEFORE = 0.25
"""How much of the time before an update a picture shows, as a share of the longest update."""

LEAST_WIDTH = 0.0015
"""Width of the shortest bar as a share of the time axis: narrower ones would not be seen."""


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One piece of work.

    Attributes:
        lane: `h2d`, `d2h`, `cpu` or `device`.
        what: `copy in`, `update`, `copy out`, `weights`, `gradient`, `gradient sum`.
        subgroup: Number of the subgroup.
        start: Seconds since the timeline's zero.
        stop: Likewise.
        bytes: What it moves or touches.
    """

    lane: str
    what: str
    subgroup: int
    start: float
    stop: float
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """The events of one update.

    Attributes:
        events: In any order.
        backward: Seconds of backward that the update is predicted to run beside, from its begin.
    """

    events: tuple[TimelineEvent, ...]
    backward: float = 0.0

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop."""
        if not self.events:
            return 0.0
        return max(e.stop for e in self.events) - min(e.start for e in self.events)

    @cached_property
    def busy_seconds(self) -> dict[str, float]:
        """Seconds each lane works."""
        return {
            lane: sum(e.stop - e.start for e in self.events if e.lane == lane) for lane in LANES
        }


def write_chrome_trace(steps: Mapping[str, Timeline], path: Path) -> None:
    """Write timelines as one trace, each as a process with a row per lane; times in microseconds.

    Args:
        steps: Timelines by name (`step 10`, `predicted`).
        path: The JSON file.
    """
    records: list[dict[str, object]] = []
    for process, (name, timeline) in enumerate(steps.items()):
        records.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        for row, lane in enumerate(LANES):
            title = {"name": LANE_TITLES[lane]}
            records.append(
                {"ph": "M", "pid": process, "tid": row, "name": "thread_name", "args": title}
            )
        records.extend(
            {
                "ph": "X",
                "pid": process,
                "tid": LANES.index(event.lane),
                "name": f"{event.what} {event.subgroup}",
                "ts": event.start * 1e6,
                "dur": (event.stop - event.start) * 1e6,
                "args": {"subgroup": event.subgroup, "bytes": event.bytes},
            }
            for event in timeline.events
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": records}), encoding="utf-8")


def draw_gantt(timelines: Mapping[str, Timeline], path: Path, note: str = "") -> None:
    """Draw timelines as Gantt charts, one above the other on one time axis.

    Time 0 is where an update begins: gradients that went before stand to the left of it, as far as
    there is room, and titles give the seconds of the update without them.

    Args:
        timelines: Timelines by title.
        path: The picture; its ending says the format.
        note: A line above all charts.
    """
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = 0.9 + 1.7 * len(timelines)
    figure = Figure(figsize=(11, height), layout="constrained")
    if note:
        figure.suptitle(note, x=0.01, ha="left", fontsize=10)
    charts = cast(
        "list[Axes]", figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0].tolist()
    )
    updates = {name: update_part(timeline) for name, timeline in timelines.items()}
    longest = max((update.makespan for update in updates.values()), default=0.0)
    unit, factor = ("s", 1.0) if longest >= 1.0 else ("ms", 1e3)
    early = any(len(updates[name].events) < len(timelines[name].events) for name in timelines)
    window = (-BEFORE * longest if early else -0.01 * longest, 1.01 * longest or 1.0)
    for chart, (name, timeline) in zip(charts, timelines.items(), strict=True):
        draw_lanes(chart, timeline, factor, window)
        seconds = updates[name].makespan * factor
        chart.set_title(f"{name}: {seconds:.3g} {unit}", loc="left", fontsize=10)
    charts[-1].set_xlabel(f"time since the update began ({unit})")
    shown = {event.what for t in timelines.values() for event in t.events}
    keys = [Patch(color=colour, label=what) for what, colour in COLOURS.items() if what in shown]
    if any(timeline.backward for timeline in timelines.values()):
        keys.append(Patch(color=BACKWARD_COLOUR, label="backward goes on"))
    figure.legend(handles=keys, loc="outside lower center", ncols=max(1, len(keys)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def update_part(timeline: Timeline) -> Timeline:
    """Return a timeline without the gradients that belong to backward."""
    return Timeline(tuple(e for e in timeline.events if not e.what.startswith("gradient")))


def draw_lanes(
    chart: object, timeline: Timeline, factor: float, window: tuple[float, float]
) -> None:
    """Draw one timeline: a row per lane, a bar per event, numbers of subgroups where they fit.

    Args:
        chart: Axes to draw on.
        timeline: What is drawn.
        factor: Units of the time axis per second.
        window: First and last second that the axis shows; 0 is the begin of the update.
    """
    from matplotlib.axes import Axes

    assert isinstance(chart, Axes)
    begin, end = (edge * factor for edge in window)
    span = end - begin
    zero = min((event.start for event in update_part(timeline).events), default=0.0)
    if timeline.backward:
        chart.axvspan(0.0, min(timeline.backward * factor, end), color=BACKWARD_COLOUR, zorder=0)
    for row, lane in enumerate(LANES):
        events = [
            event
            for event in timeline.events
            if event.lane == lane and (event.stop - zero) * factor > begin
        ]
        bars = [
            ((e.start - zero) * factor, max((e.stop - e.start) * factor, LEAST_WIDTH * span))
            for e in events
        ]
        colours = [COLOURS.get(event.what, "#999999") for event in events]
        # White gaps tell neighbours apart; they would swallow bars that are hardly wider.
        gaps = [0.4 if length > 0.005 * span else 0.0 for _, length in bars]
        chart.broken_barh(
            bars,
            (row - 0.4, 0.8),
            facecolors=colours,
            edgecolor="white",
            linewidth=gaps,
            snap=False,
        )
        for (start, length), event in zip(bars, events, strict=True):
            middle = start + length / 2
            if length > 0.02 * span and begin < middle < end:
                chart.text(middle, row, str(event.subgroup), ha="center", va="center", fontsize=7)
    chart.set_yticks(range(len(LANES)), [LANE_TITLES[lane] for lane in LANES])
    chart.set_ylim(len(LANES) - 0.4, -0.6)
    chart.set_xlim(begin, end)
    for side in ("top", "right"):
        chart.spines[side].set_visible(False)
