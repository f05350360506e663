"""Timelines of chosen updates: a trace for the browser, a picture, and a line in words."""

from pathlib import Path

from interlace.offload.hardware import HardwareProfile
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import Schedule
from interlace.offload.simulator import simulate
from interlace.offload.timeline import Timeline, draw_gantt, write_chrome_trace
from interlace.trainer.observe.console import Console

MOST_DRAWN = 3
"""Timelines in one picture; the trace holds all."""


class UpdateTraces:
    """Collects the reports of updates `first` to `last` (from 1, `last` not included).

    Args:
        span: `first:last`, as in `observe.trace_steps`; None collects nothing.
        run_dir: Receives `timeline.json` (Chrome's format, opens in Perfetto) and `timeline.png`.
        console: Gets the line in words.
    """

    def __init__(self, span: str | None, run_dir: Path, console: Console) -> None:
        first, last = (int(word) for word in span.split(":")) if span else (0, 0)
        self.span = range(first, last)
        self.run_dir = run_dir
        self.console = console
        self.timelines: dict[str, Timeline] = {}

    def take(
        self, report: UpdateReport, schedule: Schedule | None, profile: HardwareProfile | None
    ) -> None:
        """Keep a report of the span; write everything with the span's last."""
        if report.number not in self.span:
            return
        if schedule is not None and profile is not None and not self.timelines:
            self.timelines["predicted"] = simulate(schedule, profile)
        self.timelines[f"update {report.number}, measured"] = report.timeline
        self.console.note(report.words())
        if report.number == self.span[-1]:
            self.write()

    def write(self) -> None:
        """Write the files, if there is anything to write."""
        if not self.timelines:
            return
        write_chrome_trace(self.timelines, self.run_dir / "timeline.json")
        drawn = dict(list(self.timelines.items())[:MOST_DRAWN])
        draw_gantt(drawn, self.run_dir / "timeline.png")
        self.timelines = {}
