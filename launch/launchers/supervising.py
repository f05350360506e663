"""Starting a run again and again: when, after which pause, and when not.

A rank that dies takes the others with it, since they wait for it; then all of them are started
anew and continue from the newest checkpoint. That helps against machines that fail, not against a
recipe that is wrong: the exit status tells them apart (`interlace.trainer.exits`). What a start
has saved counts: a run that gets on may fail as often as it likes, one that does not only a few
times in a row.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.exits import RESTARTABLE, Exit

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)

Process = subprocess.Popen[bytes]


@dataclass
class Budget:
    """How many starts in a row may bring no new checkpoint.

    Attributes:
        limit: So many, after the first.
        step: Newest step that was committed when a start last failed.
        failures: Failed starts since that step is what it is.
    """

    limit: int
    step: int
    failures: int = 0

    def pause(self, step: int) -> float | None:
        """Count a failed start that left `step` as the newest one.

        Returns:
            Seconds to wait before the next start; None if there shall be none.
        """
        if step > self.step:
            self.step, self.failures = step, 0
        self.failures += 1
        if self.failures > self.limit:
            return None
        return min(FIRST_PAUSE_SECONDS * 2 ** (self.failures - 1), LONGEST_PAUSE_SECONDS)


@dataclass
class Stop:
    """Hands stop signals on to whatever runs; the third ends it at once."""

    process: Process | None = None
    received: list[int] = field(default_factory=list[int])

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal and pass it on."""
        self.received.append(number)
        if self.process is not None and self.process.poll() is None:
            patience_is_over = len(self.received) > 2
            self.process.send_signal(signal.SIGKILL if patience_is_over else number)

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond a signal."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))


def supervise(
    start: Callable[[int], Process],
    reason: Callable[[int], int],
    folder: Path,
    max_restarts: int,
) -> int:
    """Keep a run going until it is finished, asked to stop, or beyond help.

    Args:
        start: Starts the ranks for the so-manieth time, from 0.
        reason: Returns the status of the rank that failed first, given that of the process.
        folder: Run folder.
        max_restarts: New starts in a row that bring no new checkpoint.

    Returns:
        Exit status of the run.
    """
    budget, stop, attempt = Budget(max_restarts, newest_step(folder)), Stop(), 0
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        while True:
            stop.process = start(attempt)
            if stop.received:
                # It came while the process was being made.
                stop.process.send_signal(stop.received[-1])
            status = ended(stop.process.wait())
            if status == 0 or stop.received:
                return Exit.INTERRUPTED if status > 128 else status
            status = reason(status)
            pause = budget.pause(newest_step(folder)) if restartable(status) else None
            if pause is None:
                return status
            say(
                f"ranks ended with status {status}; start {budget.failures} of "
                f"{budget.limit} from step {budget.step} in {pause:.0f} s"
            )
            stop.sleep(pause)
            if stop.received:
                return Exit.INTERRUPTED
            attempt += 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restartable(status: int) -> bool:
    """Whether a new start may cure what a rank ended with: an error that `RESTARTABLE` names, or a
    signal (128 and its number) other than Ctrl-C.
    """
    return status in RESTARTABLE or (status > 128 and status != Exit.INTERRUPTED)


def ended(code: int) -> int:
    """Return the exit status of a process as a shell has it: 128 and the signal that ended it."""
    return code if code >= 0 else 128 - code


def newest_step(folder: Path) -> int:
    """Return the newest committed step of a run, 0 where there is none."""
    return max(CheckpointStore(folder / "checkpoints").committed_steps(), default=0)


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(f"interlace: {text}", file=sys.stderr, flush=True)
