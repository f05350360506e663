"""Keeps the performance model true while a run goes on.

Every update is measured lane by lane and compared with what the simulator gives for the same
schedule. When prediction and measurement have parted by more than 10% for several updates, rates
are corrected: of all machines near the one that was believed in, the one that explains the
measurement best. Host memory is one of the suspects: lanes that it holds up say nothing of their
own rates. The schedule is then solved again, and other homes are taken only if they promise a real
gain. Homes that turn out slower than those before are given up again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.report import UpdateReport, is_gradient
from interlace.offload.schedule import Home, Schedule
from interlace.offload.simulator import simulate
from interlace.offload.timeline import Timeline

TOLERANCE = 0.10
"""Prediction and measurement may differ by this share."""

PATIENCE = 3
"""Updates in a row that must be off before the schedule is solved again."""

REST = 10
"""Updates after a correction that only measure."""

WORTHWHILE = 0.03
"""Least gain for which state moves."""

SMOOTHING = 0.3
"""Weight of the newest update in the smoothed figures."""

FARTHEST = 100.0
"""Rates stay within this factor of what was measured or given at first."""

MEMORY_SUSPICIONS = (1.0, 0.8, 0.65, 0.5, 0.35, 0.25, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Factors on the rate of host memory that are tried as explanations."""

RELUCTANCE = 0.05
"""What a change of host memory must explain better than one of the lanes alone."""

RATE_OF_LANE = {
    "h2d": "h2d_bytes_per_second",
    "d2h": "d2h_bytes_per_second",
    "cpu": "cpu_update_bytes_per_second",
    "device": "device_update_bytes_per_second",
}


@dataclass
class Calibration:
    """The corrections of one rank.

    Attributes:
        profile: The machine as it is believed to be now.
        busy: Measured seconds of each lane, smoothed.
        seconds: Measured length of an update, smoothed; 0 while it is spread over backward.
        off: Updates in a row whose prediction was off.
        rest: Updates before the next correction may be made.
    """

    profile: HardwareProfile
    busy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    off: int = 0
    rest: int = 0

    def __post_init__(self) -> None:
        """Remember where it all began."""
        assert self.profile.rates is not None, "only rates can be corrected"
        self._first = self.profile.rates
        self._expected_for: Schedule | None = None
        self._expected = Timeline(())

    def notice(self, report: UpdateReport, schedule: Schedule) -> bool:
        """Take note of one update; return whether the schedule should be solved again."""
        measured = busy_in_updates(report.timeline)
        for lane, seconds in measured.items():
            self.busy[lane] = smoothed(self.busy.get(lane), seconds)
        self.seconds = smoothed(self.seconds or None, report.update_seconds)
        predicted = schedule.prediction.update_seconds
        if report.spread_over_backward:
            # Its length is that of backward; what its lanes needed still tells of the machine.
            self.seconds = 0.0
            expected = self.expected(schedule).busy_seconds
            off = max(abs(measured[lane] - expected[lane]) for lane in RATE_OF_LANE)
        else:
            off = abs(report.update_seconds - predicted)
        self.off = self.off + 1 if off > TOLERANCE * predicted else 0
        self.rest = max(0, self.rest - 1)
        return self.off >= PATIENCE and self.rest == 0

    def expected(self, schedule: Schedule) -> Timeline:
        """Return the simulated update of a schedule, played once."""
        if self._expected_for is not schedule:
            self._expected_for, self._expected = schedule, simulate(schedule, self.profile)
        return self._expected

    def correct(self, schedule: Schedule) -> None:
        """Believe in the machine that explains what was measured; in the present one if no other
        does better.
        """
        candidates = [self.profile, *self.suspects(schedule)]
        misfits = [self.misfit(schedule, candidate) for candidate in candidates]
        # The first is the machine as it is; the second changes the lanes alone.
        costs = [
            misfit + (RELUCTANCE if number > 1 else 0.0) for number, misfit in enumerate(misfits)
        ]
        self.profile = candidates[costs.index(min(costs))]
        self.forget()
        self.rest = REST

    def forget(self) -> None:
        """Forget what was measured: it was of other homes, or of another belief."""
        self.busy.clear()
        self.seconds = 0.0
        self.off = 0
        self._expected_for = None

    def suspects(self, schedule: Schedule) -> Iterator[HardwareProfile]:
        """Yield machines: host memory as fast as it is suspected to be, and each lane that it does
        not hold up as fast as was measured.
        """
        rates = self.profile.rates
        assert rates is not None
        for factor in MEMORY_SUSPICIONS:
            memory = self.bounded("host_dram_bytes_per_second", factor)
            changes = {"host_dram_bytes_per_second": memory}
            there = self.believing(changes)
            played = simulate(schedule, there).busy_seconds
            unhindered = simulate(schedule, self.believing({**changes, **FREE_MEMORY})).busy_seconds
            for lane, name in RATE_OF_LANE.items():
                held_up = played[lane] > 1.02 * unhindered[lane]
                if self.busy.get(lane, 0.0) > 0 and played[lane] > 0 and not held_up:
                    changes[name] = self.bounded(name, played[lane] / self.busy[lane])
            yield self.believing(changes)

    def bounded(self, name: str, factor: float) -> float:
        """Return a rate times a factor, not too far from the first."""
        rates = self.profile.rates
        first = float(getattr(self._first, name))
        changed = float(getattr(rates, name)) * factor
        return min(max(changed, first / FARTHEST), first * FARTHEST)

    def believing(self, changes: dict[str, float]) -> HardwareProfile:
        """Return the profile with other rates."""
        rates = self.profile.rates
        assert rates is not None
        corrected = OffloadRates.model_validate(rates.model_dump() | changes)
        return self.profile.model_copy(update={"rates": corrected})

    def misfit(self, schedule: Schedule, profile: HardwareProfile) -> float:
        """Return how badly a machine explains the measurement: the sum of absolute logarithms of
        measured over simulated seconds, of lanes that matter and of the whole.
        """
        played = simulate(schedule, profile)
        whole = played.makespan
        total = abs(math.log(self.seconds / whole)) if self.seconds and whole else 0.0
        for lane, seconds in self.busy.items():
            simulated = played.busy_seconds[lane]
            if simulated > 0 and seconds > 0 and max(simulated, seconds) > TOLERANCE * whole:
                total += abs(math.log(seconds / simulated))
        return total

    def words(self, report: UpdateReport, schedule: Schedule) -> str:
        """Return what was noticed, for the log."""
        expected = self.expected(schedule).busy_seconds
        lanes = ", ".join(
            f"{lane} {seconds / expected[lane]:.2f}x"
            for lane, seconds in sorted(self.busy.items())
            if expected[lane] > 0 and seconds > 0
        )
        return (
            f"updates take {report.update_seconds:.3g} s instead of the predicted "
            f"{schedule.prediction.update_seconds:.3g} s; lanes need so much of the expected time: "
            f"{lanes}"
        )


FREE_MEMORY = {"host_dram_bytes_per_second": 1e18}
"""Host memory that never holds a lane up."""


@dataclass
class Probation:
    """New homes must prove themselves.

    Attributes:
        before: The homes before the last move, and the seconds of an update with them; None while
            nothing is on trial.
        seconds: Of the updates since the move.
        refused: Homes that were given up again.
    """

    before: tuple[tuple[Home, ...], float] | None = None
    seconds: list[float] = field(default_factory=list)
    refused: set[tuple[Home, ...]] = field(default_factory=set)

    def begin(self, before: tuple[Home, ...], seconds: float) -> None:
        """Put the homes that come now on trial against those before."""
        self.before = (before, seconds) if seconds else None
        self.seconds = []

    def notice(self, seconds: float, homes: tuple[Home, ...]) -> tuple[Home, ...] | None:
        """Take note of one update; return the homes to go back to, if it is time to."""
        if self.before is None:
            return None
        self.seconds.append(seconds)
        # The first update after a move touches cold memory.
        if len(self.seconds) <= PATIENCE:
            return None
        better, limit = self.before
        self.before = None
        if sorted(self.seconds[1:])[PATIENCE // 2] <= limit:
            return None
        self.refused.add(homes)
        return better


def smoothed(before: float | None, newest: float) -> float:
    """Return the exponential average."""
    return newest if before is None else (1 - SMOOTHING) * before + SMOOTHING * newest


def busy_in_updates(timeline: Timeline) -> dict[str, float]:
    """Return the busy seconds of each lane without the gradients' way to the host."""
    return Timeline(tuple(e for e in timeline.events if not is_gradient(e))).busy_seconds
