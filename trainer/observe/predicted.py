"""The predicted update as a timeline: what the simulator plays, and what is late before it."""

from dataclasses import replace

from interlace.offload.hardware import HardwareProfile
from interlace.offload.schedule import Schedule
from interlace.offload.simulator import simulate
from interlace.offload.timeline import Timeline, TimelineEvent

LATE = "late gradients"


def predicted_timeline(
    schedule: Schedule, profile: HardwareProfile, backward: float = 0.0
) -> Timeline:
    """Return the simulated update of a schedule, with the gradients that backward does not hide
    before it: together they take as long as the prediction says.

    Args:
        schedule: What is played.
        profile: The machine.
        backward: Seconds of backward that the update runs beside.
    """
    played = simulate(schedule, profile)
    late = schedule.prediction.lane_seconds.get("flush", 0.0)
    if late <= 0.0:
        return replace(played, backward=backward)
    moved = [
        TimelineEvent(e.lane, e.what, e.subgroup, e.start + late, e.stop + late, e.bytes)
        for e in played.events
    ]
    size = int(late * profile.rates.d2h_bytes_per_second) if profile.rates else 0
    return Timeline((TimelineEvent("d2h", LATE, 0, 0.0, late, size), *moved), backward)
