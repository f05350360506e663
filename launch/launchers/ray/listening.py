"""The thread of a rank that hears what the rank itself, busy with its step, cannot.

Once a second it tells the bridge that the rank lives and is told whether to stop; it hears Ray's
notice that a machine will be taken away; and it ends the process when nobody is left to train for:
when the launching process is gone, or when the run was started again without this rank.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from interlace.launch.launchers.ray.bridge import Begun, Wish, answer
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.exits import Exit
from interlace.trainer.observe.metrics import METRICS_NAME, read_metrics
from interlace.trainer.signals import StopRequest
from interlace.trainer.starts import read_start
from interlace.trainer.world import World

BEAT_SECONDS = 1.0
"""How often a rank says that it lives and asks whether to stop."""

UNREACHABLE_SECONDS = 20.0
"""A rank that cannot reach the bridge for so long ends itself."""


class Listener:
    """Context manager around the training of one rank.

    Args:
        bridge: Handle of the bridge.
        generation: Number of this start under this launcher.
        world: The ranks.
        run_dir: The run folder.
    """

    def __init__(self, bridge: Any, generation: int, world: World, run_dir: Path) -> None:
        self.bridge = bridge
        self.generation = generation
        self.world = world
        self.run_dir = run_dir
        self.stop = StopRequest(announce=False)
        self.moving = False
        self.over = threading.Event()
        self.reached = time.monotonic()
        self.announces = world.is_main
        if self.announces:
            self.attempt_before = CheckpointStore(run_dir / "checkpoints").live_attempt()
            self.step_before = last_step(run_dir)
        self.thread = threading.Thread(target=self.work, daemon=True, name="bridge")

    def __enter__(self) -> "Listener":
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        self.thread.join()
        if self.announces:
            self.announce()

    def work(self) -> None:
        """Ask, hear and obey, until the training is over."""
        while not self.over.wait(BEAT_SECONDS):
            self.obey(self.asked())
            self.obey(notice_of_ray())
            if self.announces:
                self.announce()

    def asked(self) -> Wish:
        """Return what the bridge wants; end the process if it has been gone for too long."""
        from ray.exceptions import GetTimeoutError, RayError

        try:
            wish: Wish = answer(
                self.bridge.beat.remote(self.generation, self.world.rank), UNREACHABLE_SECONDS / 4
            )
        except (GetTimeoutError, RayError):
            if time.monotonic() - self.reached > UNREACHABLE_SECONDS:
                leave("the launching process cannot be reached")
            return Wish()
        self.reached = time.monotonic()
        return wish

    def obey(self, wish: Wish) -> None:
        """Do what is wanted."""
        if wish.superseded:
            leave("the run was started again without this rank")
        if wish.reason and not self.stop.received:
            self.moving = wish.moving
            self.stop.ask(wish.reason, *([] if wish.seconds is None else [wish.seconds]))

    def say(self, lines: Sequence[str]) -> None:
        """Send lines to the terminal; without a bridge they are lost to it."""
        from ray.exceptions import RayError

        try:
            answer(self.bridge.say.remote(self.generation, lines))
        except RayError:
            return

    def announce(self) -> None:
        """Tell once from which step this start goes on, as soon as it is on record."""
        attempt = CheckpointStore(self.run_dir / "checkpoints").live_attempt()
        if attempt <= self.attempt_before:
            return
        start = read_start(self.run_dir, attempt)
        if start is None:
            return
        self.announces = False
        lost = max(0, self.step_before - start.step)
        begun = Begun(self.generation, attempt, self.world.size, start.step, lost)
        answer(self.bridge.resume.remote(begun))


def leave_with_parent() -> None:
    """End this process when the one that has started it ends, Ray's agent of this machine: then
    the machine counts as lost. Ray looks for it too, but only for process 1 as the new parent.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(BEAT_SECONDS)
        leave("Ray has ended on this machine")

    threading.Thread(target=look, daemon=True, name="parent").start()


def last_step(run_dir: Path) -> int:
    """Return the last step on record; 0 if there is none."""
    records = read_metrics(run_dir / METRICS_NAME)
    return records[-1].step if records else 0


def notice_of_ray() -> Wish:
    """Return whether Ray has learned that a machine of this run will be taken away.

    The public call, `ray.train.get_preemption_info`, is a barrier of all ranks. Here every rank
    looks for itself; they agree at the end of the step, by the exchange that they have anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return Wish()
    seconds = None if info.deadline_ms is None else info.deadline_ms / 1000 - time.time()
    return Wish("a machine will be taken away", seconds, moving=True)


def leave(reason: str) -> None:
    """End this process at once; whatever it had not committed is void."""
    os.write(2, f"interlace: {reason}; leaving\n".encode())
    os._exit(Exit.SUPERSEDED)
