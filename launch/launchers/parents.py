"""Processes that end with those who started them, and signals that reach those who must hear them.

A launcher that is killed cannot tell its ranks. On Linux the kernel can: a process asks for a
signal at the death of its parent (prctl(2), PR_SET_PDEATHSIG). Ranks ask for SIGTERM: they finish
the step, save and leave, and no rank outlives its launcher.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask for a signal when the parent dies; does nothing on systems other than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def children() -> list[int]:
    """Return the processes that this one's main thread has started and that still are; empty on
    systems other than Linux.
    """
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        return [int(word) for word in listed.read_text(encoding="ascii").split()]
    except OSError:
        return []
