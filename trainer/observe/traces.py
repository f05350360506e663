"""Timelines of chosen updates: a trace for the browser, a picture, and a line in words."""

from pathlib import Path

from interlace.offload.hardware import HardwareProfile
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import Schedule
from interlace.offload.timeline import Timeline, draw_gantt, write_chrome_trace
from interlace.trainer.observe.console import Console
from interlace.trainer.observe.predicted import predicted_timeline

TRACE_NAME = "timeline.json"
PICTURE_NAME = "timeline.png"

MOST_DRAWN = 4
"""Measured updates in one picture; the trace holds all."""


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
        self.measured: dict[int, Timeline] = {}
        self.predicted: dict[int, Timeline] = {}
        self.in_force: Schedule | None = None
        self.made: list[int] = []
        self.written = 0

    def take(
        self, report: UpdateReport, schedule: Schedule | None, profile: HardwareProfile | None
    ) -> None:
        """Keep a report of the span; write everything with the span's last.

        Args:
            report: What an update took.
            schedule: The one that this update followed; a new one is predicted anew.
            profile: The machine that it was made for.
        """
        self.made = [*self.made[:1], report.number]
        if report.number not in self.span:
            return
        if schedule is not None and profile is not None and schedule is not self.in_force:
            self.predicted[report.number] = predicted_timeline(schedule, profile)
            self.in_force = schedule
        self.measured[report.number] = report.timeline
        self.console.note(report.words())
        if report.number == self.span[-1]:
            self.write()

    def write(self) -> None:
        """Write the files, if there is anything that they do not hold yet."""
        if len(self.measured) == self.written:
            return
        self.written = len(self.measured)
        write_chrome_trace(self.named(list(self.measured)), self.run_dir / TRACE_NAME)
        drawn = list(self.measured)[:MOST_DRAWN]
        note = ""
        if len(drawn) < len(self.measured):
            note = (
                f"the first {len(drawn)} of {len(self.measured)} traced updates; {TRACE_NAME} "
                "holds all"
            )
        draw_gantt(self.named(drawn), self.run_dir / PICTURE_NAME, note)

    def named(self, numbers: list[int]) -> dict[str, Timeline]:
        """Return timelines of updates by title, each prediction before the first that it is for."""
        found: dict[str, Timeline] = {}
        for number in numbers:
            if number in self.predicted:
                first = not found
                name = "predicted" if first else f"predicted from update {number} on"
                found[name] = self.predicted[number]
            found[f"update {number}, measured"] = self.measured[number]
        return found

    def close(self) -> None:
        """Write what is left, and say which updates of the span there were none of."""
        self.write()
        missing = [number for number in self.span if number not in self.measured]
        if not missing:
            return
        made = f"updates {self.made[0]} to {self.made[-1]}" if self.made else "no update"
        span = f"{self.span.start}:{self.span.stop}"
        which = (
            "no update of it was"
            if not self.measured
            else f"{len(missing)} of its updates were not"
        )
        self.console.note(
            f"observe.trace_steps={span}: {which} traced, since this start made {made}"
        )
