"""Watches the updates of one optimizer: measures each, reports it, and notices when the performance
model is wrong.
"""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from interlace.offload.calibration import Calibration, Probation
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.report import UpdateReport, clock_for, report_of
from interlace.offload.schedule import Home, Schedule
from interlace.offload.subgroup import SubgroupState

logger = logging.getLogger(__name__)


class Monitor:
    """Collects the tickets of one step after another.

    Attributes:
        blocked_seconds: How long the caller has waited for updates, in all.
        on_report: Called with the report of every finished update.
        last: The newest report.
        corrected: The machine as calibration believes it to be; None while nothing was corrected.
        probation: Whether the newest homes are faster than those before.
        retreat: The homes to take back, where these were.
    """

    def __init__(self, lanes: Lanes, profile: HardwareProfile | None, recalibrate: bool) -> None:
        self.lanes = lanes
        self.blocked_seconds = 0.0
        self.on_report: Callable[[UpdateReport], None] | None = None
        self.last: UpdateReport | None = None
        self.corrected: HardwareProfile | None = None
        watch = recalibrate and profile is not None and profile.rates is not None
        self._calibration = Calibration(profile) if watch and profile is not None else None
        self.probation = Probation()
        self.retreat: tuple[Home, ...] | None = None
        self._measured = 0.0
        self._tickets: list[Ticket] = []
        self._zero = time.perf_counter()
        self._blocked_before = 0.0
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._number = 0
        self._retries = allocation_retries(lanes.device)

    def begin(self) -> None:
        """Set the zero of a step's timeline."""
        self._zero = time.perf_counter()

    def forget_work(self) -> None:
        """Forget an update that was given up."""
        self._tickets = []

    def launched(self, subgroup: SubgroupState, gradients: list[Ticket], number: int) -> None:
        """Take note of one subgroup's update and of the gradients that it used."""
        self._tickets += [*gradients, *subgroup.updating]
        self._number = max(self._number, number)

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count the time spent inside as exposed: the caller's, or the device's where there is one,
        whose streams wait while the host goes on.
        """
        start, stalled = time.perf_counter(), self._mark()
        try:
            yield
        finally:
            self.blocked_seconds += time.perf_counter() - start
            resumed = self._mark()
            if stalled is not None and resumed is not None:
                self._stalls.append((stalled, resumed))

    def _mark(self) -> torch.cuda.Event | None:
        """Record where the current stream is, on a GPU."""
        if self.lanes.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.lanes.device))
        return event

    def _exposed(self) -> float:
        """Return the seconds that were exposed since the last call. What the device has not come to
        yet counts the next time: to wait for it would expose more.
        """
        before, self._blocked_before = self._blocked_before, self.blocked_seconds
        if self.lanes.device.type != "cuda":
            return self.blocked_seconds - before
        passed = [pair for pair in self._stalls if pair[1].query()]
        self._stalls = self._stalls[len(passed) :]
        return sum(stalled.elapsed_time(resumed) for stalled, resumed in passed) / 1e3

    def finish(self, schedule: Schedule | None, homes: tuple[Home, ...]) -> bool:
        """Report the update that is complete; return whether homes should be chosen anew, or taken
        back: `retreat` says which then.
        """
        self.retreat = None
        if not self._tickets:
            return False
        tickets, self._tickets = self._tickets, []
        prediction = schedule.prediction if schedule is not None else None
        clock = clock_for(self.lanes, self._zero)
        report = report_of(self._number, tickets, clock, self._exposed(), prediction)
        self.last = report
        if self.on_report is not None:
            self.on_report(report)
        calibration = self._calibration
        if calibration is None or schedule is None:
            return False
        self.retreat = self.probation.notice(report.update_seconds, homes)
        if self.retreat is not None:
            logger.info("the new homes are slower than those before: back to these")
            calibration.forget()
            return True
        if not calibration.notice(report, schedule):
            return False
        logger.info("%s", calibration.words(report, schedule))
        self._measured = calibration.seconds
        calibration.correct(schedule)
        self.corrected = calibration.profile
        return True

    def homes_changed(self) -> None:
        """Forget what was measured, and who is on trial: homes changed for other reasons."""
        self.probation.before = None
        if self._calibration is not None:
            self._calibration.forget()

    def moved(self, before: tuple[Home, ...], now: tuple[Home, ...]) -> None:
        """Let new homes prove themselves against those before, unless these are the old ones."""
        if before != now and self.retreat is None:
            self.probation.begin(before, self._measured)

    def device_is_short(self) -> bool:
        """Whether the allocator had to free its cache to go on since the last call."""
        before, self._retries = self._retries, allocation_retries(self.lanes.device)
        return self._retries > before


def allocation_retries(device: torch.device) -> int:
    """Return how often torch's allocator ran out of device memory and retried."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
