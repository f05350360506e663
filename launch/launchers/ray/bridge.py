"""Between the terminal and the ranks: lines go one way, the wish to stop the other.

An actor without a core of its own, on the launching machine. Every start of the ranks (a
generation) says so here; what a rank of an older generation says afterwards, one that was thought
dead and woke up, is not heard. Ranks ask once a second, so the last time each was heard of tells
when a killed one died.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAME = "interlace-bridge"


@dataclass
class Wish:
    """That the run shall stop.

    Attributes:
        reason: Who wants it, in words.
        seconds: How long there is until it is stopped by force; None for as long as it takes.
    """

    reason: str
    seconds: float | None


@dataclass
class Ending:
    """How a rank ended by itself.

    Attributes:
        generation: Of which start it was.
        rank: Its number.
        status: The exit status it would have had.
        finished: Whether all steps are done.
        message: For a person.
    """

    generation: int
    rank: int
    status: int
    finished: bool
    message: str


@dataclass
class Begun:
    """That a start of the ranks takes up the training.

    Attributes:
        generation: Number of the start, from 1.
        ranks: How many there are.
        step: The step it goes on from.
        lost_steps: Steps done before that have to be done again.
        seconds: From the end of the generation before; None for the first.
    """

    generation: int
    ranks: int
    step: int
    lost_steps: int
    seconds: float | None


@dataclass
class News:
    """What the launching process has not heard yet."""

    lines: list[str] = field(default_factory=list[str])
    begun: list[Begun] = field(default_factory=list[Begun])
    endings: list[Ending] = field(default_factory=list[Ending])

    def __bool__(self) -> bool:
        return bool(self.lines or self.begun or self.endings)


class Bridge:
    """The actor; only one generation of ranks at a time is listened to."""

    def __init__(self) -> None:
        self.generation = 0
        self.wish: Wish | None = None
        self.news = News()
        self.arrived = asyncio.Event()
        self.heard: dict[int, float] = {}
        self.lost_at: float | None = None

    async def begin(self) -> int:
        """Begin a generation; return its number. Called by rank 0 of every start."""
        if self.generation:
            self.lost_at = min(self.heard.values(), default=time.monotonic())
        self.heard = {}
        self.generation += 1
        return self.generation

    async def resume(self, generation: int, ranks: int, step: int, lost_steps: int) -> None:
        """Note from which step a generation goes on."""
        if generation != self.generation:
            return
        seconds = None if self.lost_at is None else time.monotonic() - self.lost_at
        self.tell().begun.append(Begun(generation, ranks, step, lost_steps, seconds))

    async def beat(self, generation: int, rank: int) -> Wish | None:
        """Hear that a rank lives; tell it whether to stop."""
        if generation != self.generation:
            return None
        self.heard[rank] = time.monotonic()
        return self.wish

    async def say(self, generation: int, lines: Sequence[str]) -> None:
        """Take lines for the terminal."""
        if generation == self.generation:
            self.tell().lines.extend(lines)

    async def end(self, ending: Ending) -> None:
        """Take how a rank ended."""
        if ending.generation == self.generation:
            self.heard.setdefault(ending.rank, time.monotonic())
            self.tell().endings.append(ending)

    async def stop(self, reason: str, seconds: float | None) -> None:
        """Make the ranks stop after their step."""
        self.wish = Wish(reason, seconds)

    async def listen(self, seconds: float) -> News:
        """Return what is new, waiting for so long at most."""
        try:
            await asyncio.wait_for(self.arrived.wait(), seconds)
        except TimeoutError:
            return News()
        news, self.news = self.news, News()
        self.arrived.clear()
        return news

    def tell(self) -> News:
        """Return where to put something new, and wake who listens."""
        self.arrived.set()
        return self.news


def answer(reference: Any, seconds: float | None = None) -> Any:
    """Return what a call to the bridge gives.

    Raises:
        ray.exceptions.GetTimeoutError: It took longer than so many seconds.
        ray.exceptions.RayActorError: The bridge is gone, and so is who has launched the run.
    """
    import ray

    # A name without a type: the signature of `get` knows lists only.
    get: Any = ray.get
    return get(reference, timeout=seconds)


def open_bridge() -> Any:
    """Start the actor and return its handle."""
    import ray

    # Called as functions, the wrappers of Ray have no types.
    actor: Any = ray.remote(Bridge)
    return actor.options(num_cpus=0, max_concurrency=1000).remote()
