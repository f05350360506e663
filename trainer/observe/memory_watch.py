"""Says once that host memory gets short, while there is still time to do something about it.

The kernel kills without a word. What it counts is asked now and then, for rank 0's host: what is
available on the machine, and what the control groups of the process leave it.
"""

from collections.abc import Callable

from interlace.offload.hardware import host_memory_bytes
from interlace.offload.memory import available_host_bytes
from interlace.trainer.observe.units import human_bytes

SHORT_SHARE = 0.05
"""Share of the host's memory below which what is left is called short."""


class MemoryWatch:
    """Looks at the free memory of this host.

    Args:
        say: Receives the one warning.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said = False

    def look(self) -> None:
        """Warn if memory is short, unless that was said before."""
        if self.said:
            return
        left, there = available_host_bytes(), host_memory_bytes()
        if left < SHORT_SHARE * there:
            self.said = True
            self.say(
                f"host memory gets short: {human_bytes(left)} of {human_bytes(there)} are left. "
                "Beyond that the kernel kills processes; what is committed stays. See what else "
                "runs here, or resume with less: train.microbatch_rows, offload.moments=bfloat16"
            )
