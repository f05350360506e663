"""How long a rank may go without a sign of life.

A fixed limit, or one that learns: five times the longest interval between two marks that was seen
in usual phases of a step, but at least two minutes, so that a laptop under load or a pause of the
machine does not end a run. While something long and legitimate may be under way (`Pulse.patient`)
ten times as much is allowed. Data that moves is a sign of life too: a checkpoint of a terabyte
takes long to load, and an update may have to wait until the one before is on a slow disk.
"""

from interlace.trainer.heartbeat import Pulse

LEAST_SECONDS = 120.0
TIMES_LONGEST = 5.0
TIMES_WHILE_PATIENT = 10.0
LEAST_BYTES_PER_SECOND = 2**20
"""Less is what loggers and clusters' agents write all the time."""


class Patience:
    """Judges one rank by the change of its pulse.

    Args:
        seconds: The limit in usual phases; None learns it.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.longest = 0.0
        self.idle = 0.0
        self.extended = 1.0
        self.pulse: Pulse | None = None
        self.moved_bytes = 0

    def observe(self, pulse: Pulse, elapsed: float, moved_bytes: int = 0) -> None:
        """Take note of a look at the rank.

        Args:
            pulse: What it has told last.
            elapsed: Seconds since the look before.
            moved_bytes: Bytes that its process has read and written so far.
        """
        before, self.pulse = self.pulse, pulse
        moves = moved_bytes - self.moved_bytes >= LEAST_BYTES_PER_SECOND * max(elapsed, 1.0)
        self.moved_bytes = moved_bytes
        self.idle += elapsed
        if before is None or pulse.beats != before.beats:
            if before is not None and not before.patient:
                self.longest = max(self.longest, self.idle)
            self.idle, self.extended = 0.0, 1.0
        elif moves:
            self.idle = 0.0

    def extend(self) -> None:
        """Allow twice as much until the next mark: another rank has a reason to take its time."""
        self.extended *= 2

    @property
    def limit(self) -> float:
        """Seconds without a beat that are allowed now."""
        usual = self.seconds or max(LEAST_SECONDS, TIMES_LONGEST * self.longest)
        patient = self.pulse is None or self.pulse.patient
        return self.extended * (usual * TIMES_WHILE_PATIENT if patient else usual)

    @property
    def lost(self) -> bool:
        """Whether the rank has been silent for too long."""
        return self.idle > self.limit
