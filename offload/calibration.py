"""Keeps the performance model true while a run goes on.

Every update is measured lane by lane. What a lane needed is compared with what the simulator gave
it for the same schedule; the ratio, smoothed, corrects the lane's rate. When prediction and
measurement have parted by more than 10% for several updates the schedule is solved again with the
corrected rates, and other homes are taken only if they promise a real gain: noise must not shuffle
state about.
"""

from dataclasses import dataclass, field

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.report import UpdateReport, is_gradient
from interlace.offload.schedule import Schedule
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
"""Weight of the newest update in the smoothed ratios."""

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
        slowness: Measured over expected seconds of each lane, smoothed.
        off: Updates in a row whose prediction was off.
        rest: Updates before the next correction may be made.
    """

    profile: HardwareProfile
    slowness: dict[str, float] = field(default_factory=dict)
    off: int = 0
    rest: int = 0
    _expected_for: Schedule | None = None
    _expected: Timeline | None = None

    def notice(self, report: UpdateReport, schedule: Schedule) -> bool:
        """Take note of one update; return whether the schedule should be solved again."""
        measured = busy_in_updates(report.timeline)
        for lane, expected in self.expected(schedule).busy_seconds.items():
            if expected > 0 and measured.get(lane, 0.0) > 0:
                ratio = measured[lane] / expected
                before = self.slowness.get(lane, ratio)
                self.slowness[lane] = (1 - SMOOTHING) * before + SMOOTHING * ratio
        predicted = schedule.prediction.update_seconds
        if report.spread_over_backward:
            # Its length is that of backward; what its lanes needed still tells of the machine.
            expected_of = self.expected(schedule).busy_seconds
            off = max(abs(measured[lane] - expected_of[lane]) for lane in expected_of)
        else:
            off = abs(report.update_seconds - predicted)
        apart = off > TOLERANCE * predicted
        self.off = self.off + 1 if apart else 0
        self.rest = max(0, self.rest - 1)
        return self.off >= PATIENCE and self.rest == 0

    def expected(self, schedule: Schedule) -> Timeline:
        """Return the simulated update of a schedule, played once."""
        if self._expected_for is not schedule or self._expected is None:
            self._expected_for, self._expected = schedule, simulate(schedule, self.profile)
        return self._expected

    def correct(self) -> None:
        """Believe what was measured."""
        rates = self.profile.rates
        assert rates is not None
        changes = {
            RATE_OF_LANE[lane]: getattr(rates, RATE_OF_LANE[lane]) / min(10.0, max(0.1, slowness))
            for lane, slowness in self.slowness.items()
        }
        mean = sum(self.slowness.values()) / len(self.slowness)
        changes["piece_overhead_seconds"] = rates.piece_overhead_seconds * mean
        # A CPU that updates faster than memory was thought to be proves memory faster.
        least = changes.get("cpu_update_bytes_per_second", 0.0) * rates.ranks_per_node
        changes["host_dram_bytes_per_second"] = max(rates.host_dram_bytes_per_second, least)
        corrected = OffloadRates.model_validate(rates.model_dump() | changes)
        self.profile = self.profile.model_copy(update={"rates": corrected})
        self.slowness.clear()
        self.off, self.rest = 0, REST
        self._expected_for = None

    def words(self, report: UpdateReport, predicted: float) -> str:
        """Return what was noticed, for the log."""
        lanes = ", ".join(
            f"{lane} {slowness:.2f}x" for lane, slowness in sorted(self.slowness.items())
        )
        return (
            f"updates take {report.update_seconds:.3g} s instead of the predicted {predicted:.3g} "
            f"s; lanes need so much of the expected time: {lanes}"
        )


def busy_in_updates(timeline: Timeline) -> dict[str, float]:
    """Return the busy seconds of each lane without the gradients' way to the host."""
    return Timeline(tuple(e for e in timeline.events if not is_gradient(e))).busy_seconds
