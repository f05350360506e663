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
}


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
    """The events of one update."""

    events: tuple[TimelineEvent, ...]

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


def draw_gantt(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw timelines as Gantt charts, one above the other on one time axis."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = 0.9 + 1.7 * len(timelines)
    figure = Figure(figsize=(11, height), layout="constrained")
    charts = cast(
        "list[Axes]", figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0].tolist()
    )
    longest = max((t.makespan for t in timelines.values()), default=0.0)
    unit, factor = ("s", 1.0) if longest >= 1.0 else ("ms", 1e3)
    for chart, (name, timeline) in zip(charts, timelines.items(), strict=True):
        draw_lanes(chart, timeline, factor, longest)
        chart.set_title(f"{name}: {timeline.makespan * factor:.3g} {unit}", loc="left", fontsize=10)
    charts[-1].set_xlabel(f"time ({unit})")
    shown = {event.what for t in timelines.values() for event in t.events}
    keys = [Patch(color=colour, label=what) for what, colour in COLOURS.items() if what in shown]
    figure.legend(handles=keys, loc="outside lower center", ncols=max(1, len(keys)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_lanes(chart: object, timeline: Timeline, factor: float, longest: float) -> None:
    """Draw one timeline: a row per lane, a bar per event, numbers of subgroups where they fit."""
    from matplotlib.axes import Axes

    assert isinstance(chart, Axes)
    zero = min((event.start for event in timeline.events), default=0.0)
    for row, lane in enumerate(LANES):
        events = [event for event in timeline.events if event.lane == lane]
        bars = [((e.start - zero) * factor, (e.stop - e.start) * factor) for e in events]
        colours = [COLOURS.get(event.what, "#999999") for event in events]
        # White gaps tell neighbours apart; they would swallow bars that are hardly wider.
        gaps = [0.4 if length > 0.005 * longest * factor else 0.0 for _, length in bars]
        chart.broken_barh(
            bars, (row - 0.4, 0.8), facecolors=colours, edgecolor="white", linewidth=gaps
        )
        for (start, length), event in zip(bars, events, strict=True):
            if length > 0.02 * longest * factor:
                middle = start + length / 2
                chart.text(middle, row, str(event.subgroup), ha="center", va="center", fontsize=7)
    chart.set_yticks(range(len(LANES)), [LANE_TITLES[lane] for lane in LANES])
    chart.invert_yaxis()
    chart.margins(x=0.01)
    for side in ("top", "right"):
        chart.spines[side].set_visible(False)
