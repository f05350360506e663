"""What every rank does under Ray Train: open its world, train, and say how it ended.

Ray Train calls `run_rank` in a thread of a process of its own, in which the process group exists
already. Signals reach neither this thread nor a process of another machine, so a second thread asks
the bridge once a second whether to stop, and hands lines that are printed over to it.
"""

import io
import os
import queue
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.launch.launchers.ray.bridge import Ending, answer
from interlace.trainer.errors import UserError
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.world import World

BEAT_SECONDS = 1.0
"""How often a rank says that it lives and asks whether to stop."""

LINE_SECONDS = 0.1
"""How long printed lines are collected before they are sent together."""

UNREACHABLE_SECONDS = 20.0
"""A rank whose launching process cannot be reached for so long ends itself."""


@dataclass(frozen=True)
class Errand:
    """What a rank is told to do.

    Attributes:
        tables: The recipe, as its tables.
        folder: What relative paths in it are relative to.
        bridge: Handle of the bridge.
    """

    tables: Mapping[str, Any]
    folder: str
    bridge: Any


def run_rank(errand: Errand) -> str:
    """Train as one rank of several; return how it ended, for the log of Ray."""
    from interlace.trainer.config.checks import validate

    if Path(errand.folder).is_dir():
        os.chdir(errand.folder)
    world = world_of_ray()
    bridge = errand.bridge
    generation = world.broadcast(answer(bridge.begin.remote()) if world.is_main else 0)
    with console_of(bridge, generation, world):
        ended = train_as(generation, world, validate(errand.tables), bridge)
    answer(bridge.end.remote(ended))
    return ended.message


def world_of_ray() -> World:
    """Return this process's place among the ranks that Ray Train has started."""
    import torch
    from ray import train

    context = train.get_context()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return World(context.get_world_rank(), context.get_world_size(), device)


def train_as(generation: int, world: World, config: Any, bridge: Any) -> Ending:
    """Train; return how it ended, or raise what a new start may cure."""
    from interlace.trainer.loop import train
    from interlace.trainer.signals import StopRequest

    stop = StopRequest(announce=False)
    with listening(bridge, generation, world.rank, stop):
        try:
            outcome = train(config, world, stop=stop, on_commit=report_commit)
        except UserError as error:
            status = status_of(error)
            return Ending(generation, world.rank, status, False, str(error))
    return Ending(generation, world.rank, Exit.DONE, outcome.finished, f"step {outcome.step}")


def report_commit(step: int) -> None:
    """Tell Ray Train of a committed checkpoint, so that its own records show the progress; what
    a run resumes from is read from the run folder alone.
    """
    from ray import train

    train.report({"committed_step": step})


@contextmanager
def listening(bridge: Any, generation: int, rank: int, stop: Any) -> Generator[None]:
    """Ask the bridge once a second whether to stop, in a thread, while the context is open."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(BEAT_SECONDS):
            wish = answer(bridge.beat.remote(generation, rank))
            if wish is not None and not stop.received:
                stop.ask(wish.reason, *([] if wish.seconds is None else [wish.seconds]))

    thread = threading.Thread(target=ask, daemon=True, name="bridge")
    thread.start()
    try:
        yield
    finally:
        over.set()


class Forwarded(io.TextIOBase):
    """A text stream whose lines are sent through the bridge, and written where they went before."""

    def __init__(self, bridge: Any, generation: int, beneath: Any) -> None:
        self.bridge = bridge
        self.generation = generation
        self.beneath = beneath
        self.rest = ""
        self.lock = threading.Lock()
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.thread = threading.Thread(target=self.send, daemon=True, name="console")
        self.thread.start()

    def write(self, text: str) -> int:
        """Take text; whole lines are on their way at once."""
        self.beneath.write(text)
        with self.lock:
            *whole, self.rest = (self.rest + text).split("\n")
            for line in whole:
                self.lines.put(line)
        return len(text)

    def flush(self) -> None:
        """Flush what lies beneath."""
        self.beneath.flush()

    def send(self) -> None:
        """Send lines, those of a moment together."""
        while True:
            batch = [self.lines.get()]
            with suppress(queue.Empty):
                while batch[-1] is not None:
                    batch.append(self.lines.get(timeout=LINE_SECONDS))
            lines = [line for line in batch if line is not None]
            if lines:
                answer(self.bridge.say.remote(self.generation, lines))
            if batch[-1] is None:
                return

    def finish(self) -> None:
        """Send what is left and wait until it has arrived."""
        if self.rest:
            self.lines.put(self.rest)
        self.lines.put(None)
        self.thread.join()


@contextmanager
def console_of(bridge: Any, generation: int, world: World) -> Generator[None]:
    """Let what rank 0 prints appear in the launching terminal."""
    if not world.is_main:
        yield
        return
    before = sys.stdout
    sys.stdout = forwarded = Forwarded(bridge, generation, before)  # pyright: ignore
    try:
        yield
    finally:
        sys.stdout = before
        forwarded.finish()
