"""How long a rank may go without a sign of life.

A fixed limit, or one that learns: five times the longest interval between two marks that was seen
in usual phases of a step, but at least two minutes, so that a laptop under load or a pause of the
machine does not end a run. While something long and legitimate may be under way (`Pulse.patient`)
ten times as much is allowed.
"""

from interlace.trainer.heartbeat import Pulse

LEAST_SECONDS = 120.0
TIMES_LONGEST = 5.0
TIMES_WHILE_PATIENT = 10.0


class Patience:
    """Judges one rank by the change of its pulse.

    Args:
        seconds: The limit in usual phases; None learns it.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.longest = 0.0
        self.idle = 0.0
        self.pulse: Pulse | None = None

    def observe(self, pulse: Pulse, elapsed: float) -> None:
        """Take note of a look at the pulse, `elapsed` seconds after the look before."""
        before, self.pulse = self.pulse, pulse
        self.idle += elapsed
        if before is None or pulse.beats != before.beats:
            if before is not None and not before.patient:
                self.longest = max(self.longest, self.idle)
            self.idle = 0.0

    @property
    def limit(self) -> float:
        """Seconds without a beat that are allowed now."""
        usual = self.seconds or max(LEAST_SECONDS, TIMES_LONGEST * self.longest)
        patient = self.pulse is None or self.pulse.patient
        return usual * TIMES_WHILE_PATIENT if patient else usual

    @property
    def lost(self) -> bool:
        """Whether the rank has been silent for too long."""
        return self.idle > self.limit
