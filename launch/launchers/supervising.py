"""Starting a run again and again: when, after which pause, and when not.

A rank that dies takes the others with it, since they wait for it; then all of them are started
anew and continue from the newest checkpoint. That helps against machines that fail, not against a
recipe that is wrong: the exit status tells them apart (`interlace.trainer.exits`). What a start
has saved counts: a run that gets on may fail as often as it likes, one that does not only a few
times in a row.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.ends import CONSEQUENCES, describe_end, first_failure
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
        memory: Whether the last one of them ended because memory ran out, which is worth one more
            try: somebody else may have had it. A second time it is the recipe.
    """

    limit: int
    step: int
    failures: int = 0
    memory: bool = False

    def pause(self, step: int, status: int = Exit.DEFECT) -> float | None:
        """Count a failed start that left `step` as the newest one and ended with `status`.

        Returns:
            Seconds to wait before the next start; None if there shall be none.
        """
        if step > self.step:
            self.step, self.failures, self.memory = step, 0, False
        self.failures += 1
        again, self.memory = self.memory, status == Exit.MEMORY
        if self.failures > self.limit or (again and self.memory):
            return None
        return min(FIRST_PAUSE_SECONDS * 2 ** (self.failures - 1), LONGEST_PAUSE_SECONDS)


@dataclass
class Stop:
    """Hands stop signals on to whatever runs, while it is open; the third ends that at once."""

    process: Process | None = None
    received: list[int] = field(default_factory=list[int])
    before: dict[int, Any] = field(default_factory=dict[int, Any])

    def __enter__(self) -> "Stop":
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal and pass it on; of several SIGTERMs of Slurm, which sends one for each
        reason that it has and kills by itself, only the first.
        """
        if number == signal.SIGTERM and number in self.received and "SLURM_STEP_ID" in os.environ:
            return
        self.received.append(number)
        if self.process is not None and self.process.poll() is None:
            patience_is_over = len(self.received) > 2
            self.process.send_signal(signal.SIGKILL if patience_is_over else number)

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond a signal."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))


@dataclass(frozen=True)
class Failure:
    """Why the ranks of one start ended.

    Attributes:
        status: Exit status of the rank that failed first.
        line: What happened, in a line.
        page: The same with its traceback; empty where nothing is on record.
    """

    status: int
    line: str
    page: str

    @property
    def restartable(self) -> bool:
        """Whether a new start may cure it: an error that `RESTARTABLE` names, or an end by a signal
        (128 and its number) other than Ctrl-C.
        """
        by_signal = self.status > 128 and self.status != Exit.INTERRUPTED
        return self.status in RESTARTABLE or by_signal


def failure_of(folder: Path, before: int, status: int) -> Failure:
    """Return why ranks ended.

    Args:
        folder: Run folder, where every rank leaves how it failed.
        before: Attempt that was the newest one before the start.
        status: Exit status of the process that held the ranks, used where no rank has left any.
    """
    name = signal.Signals(status - 128).name if status > 128 else ""
    line = f"a rank was ended by {name}" if name else f"the ranks ended with status {status}"
    end = first_failure(folder, before)
    if end is None:
        return Failure(status, line, "")
    if end.kind in CONSEQUENCES:
        # Whoever failed first could not say so.
        return Failure(status, line, describe_end(end))
    line = f"rank {end.rank}: {end.reason.splitlines()[0] if end.reason else end.kind}"
    return Failure(status if end.status is None else end.status, line, describe_end(end))


def supervise(start: Callable[[int], Process], folder: Path, max_restarts: int) -> int:
    """Keep a run going until it is finished, asked to stop, or beyond help.

    Args:
        start: Starts the ranks for the so-manieth time, from 0.
        folder: Run folder.
        max_restarts: New starts in a row that bring no new checkpoint.

    Returns:
        Exit status of the run.
    """
    store, stop = CheckpointStore(folder / "checkpoints"), Stop()
    budget, attempt = Budget(max_restarts, newest_step(store)), 0
    with stop:
        while True:
            before = store.live_attempt()
            stop.process = start(attempt)
            if stop.received:
                # It came while the process was being made.
                stop.process.send_signal(stop.received[-1])
            status = ended(stop.process.wait())
            if status == 0:
                return status
            failure = failure_of(folder, before, status)
            if stop.received:
                # It was asked to leave, so an end by a signal is none to tell of.
                return Exit.INTERRUPTED if failure.status > 128 else told(failure)
            pause = None
            if failure.restartable:
                pause = budget.pause(newest_step(store), failure.status)
            if pause is None:
                return told(failure)
            again = f"start {budget.failures} of {budget.limit} from step {budget.step}"
            say(f"{failure.line}; {again} in {pause:.0f} s")
            stop.sleep(pause)
            if stop.received:
                return told(failure)
            attempt += 1


def told(failure: Failure) -> int:
    """Tell a failure that is the last one; return its status."""
    if failure.page:
        say(f"the first failure was\n{failure.page}")
    return failure.status


def ended(code: int) -> int:
    """Return the exit status of a process as a shell has it: 128 and the signal that ended it."""
    return code if code >= 0 else 128 - code


def newest_step(store: CheckpointStore) -> int:
    """Return the newest committed step of a run, 0 where there is none."""
    return max(store.committed_steps(), default=0)


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(f"interlace: {text}", file=sys.stderr, flush=True)
