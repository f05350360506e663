"""The launching process while ranks train: it prints, hears signals, and knows when it is over."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from interlace.launch.launchers.ray.bridge import Begun, Ending, News, Wish, answer
from interlace.launch.launchers.supervising import failure_of, say
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.ends import CONSEQUENCES, ends_of
from interlace.trainer.exits import RESTARTABLE, Exit
from interlace.trainer.starts import in_short

LISTEN_SECONDS = 0.5
WAITING_SECONDS = 60.0
"""After so long without ranks a person is told what is waited for, and every so often again."""


@dataclass
class Terminal:
    """What the launching process hears, prints and decides.

    Attributes:
        bridge: Handle of the bridge.
        run_dir: The run folder.
        output: Where lines are printed.
        attempt_before: The newest attempt in it when this launch began.
        endings: How ranks of the newest generation ended, so far.
        fatal: The first end that a new start cannot cure.
        asked: The first stop signal.
        begun: Whether any rank has begun to train.
    """

    bridge: Any
    run_dir: Path
    output: TextIO
    attempt_before: int = -1
    endings: list[Ending] = field(default_factory=list[Ending])
    fatal: Ending | None = None
    asked: signal.Signals | None = None
    begun: bool = False

    def __post_init__(self) -> None:
        self.attempt_before = CheckpointStore(self.run_dir / "checkpoints").live_attempt()

    @property
    def moving(self) -> bool:
        """Whether the run stopped only to go on elsewhere."""
        return self.asked is None and any(ending.moving for ending in self.endings)

    def watch(self, running: Callable[[], bool]) -> None:
        """Print and listen until the ranks have ended for good, or for a reason that ends the run.

        Raises:
            KeyboardInterrupt: There is a signal and nothing to save, or a second one.
        """
        self.endings.clear()
        self.begun = False
        told = time.monotonic()
        while running() and self.fatal is None:
            self.take(self.listen(LISTEN_SECONDS))
            if self.asked is not None and not self.begun:
                raise KeyboardInterrupt
            if not self.begun and time.monotonic() > told + WAITING_SECONDS:
                told = time.monotonic()
                self.print(waiting_line())
        self.take(self.listen(LISTEN_SECONDS))

    def listen(self, seconds: float) -> News:
        """Return what came over the bridge."""
        return answer(self.bridge.listen.remote(seconds))

    def print(self, line: str) -> None:
        """Print a line, at once."""
        print(line, file=self.output, flush=True)

    def take(self, news: News) -> None:
        """Print lines and note ends."""
        for begun in news.begun:
            self.begun = True
            self.endings.clear()
            if begun.seconds is not None:
                for line in recovery_lines(begun, self.run_dir):
                    self.print(line)
        for line in news.lines:
            self.print(line)
        for ending in news.endings:
            self.endings.append(ending)
            cured = ending.status in RESTARTABLE or ending.status == Exit.DONE
            if not cured and self.fatal is None:
                self.fatal = ending

    def status(self, failure: BaseException | None) -> int:
        """Return the exit status of the run; say why, if it is not 0.

        Args:
            failure: What Ray Train raised.
        """
        if self.fatal is not None:
            say(self.fatal.message)
            return self.fatal.status
        if failure is not None:
            first = failure_of(self.run_dir, self.attempt_before, Exit.DEFECT)
            say(f"the first failure was\n{first.page}" if first.page else str(failure))
            return first.status
        return max((ending.status for ending in self.endings), default=Exit.DEFECT)

    @contextmanager
    def hearing_signals(self) -> Generator[None]:
        """Hand the first stop signal to the ranks; leave at once on the second."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal and let the ranks know."""
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        say(f"{self.asked.name}: finishing this step and saving; once more exits at once")
        self.bridge.stop.remote(Wish(self.asked.name))


def recovery_lines(begun: Begun, run_dir: Path) -> list[str]:
    """Return what is said when the training goes on."""
    took = f"{begun.seconds:.1f} s after" if begun.seconds is not None else "after"
    if begun.moved:
        return [
            f"attempt {begun.attempt} goes on at step {begun.step} on {begun.ranks} ranks, {took} "
            "the last one stopped"
        ]
    before = begun.attempt - 1
    causes = [end for end in ends_of(run_dir, before) if end.kind not in CONSEQUENCES]
    return [
        *(f"attempt {before} failed: {in_short(end)}" for end in causes[:1]),
        f"attempt {begun.attempt} resumed at step {begun.step} on {begun.ranks} ranks, {took} the "
        f"failure, {begun.lost_steps} steps repeated",
    ]


def waiting_line() -> str:
    """Return what is said while no rank can start."""
    import ray

    every, free = ray.cluster_resources(), ray.available_resources()
    room = ", ".join(
        f"{free.get(name, 0):g} of {every.get(name, 0):g} {name}s" for name in ("CPU", "GPU")
    )
    return f"waiting for ranks to start; in the cluster {room} are free"
