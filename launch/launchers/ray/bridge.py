"""Between the terminal and the ranks: lines go one way, the wish to stop the other.

An actor without a core of its own. Every start of the ranks (a generation) says so here; what a
rank of an older generation says afterwards, one that was thought dead and woke up, is not heard,
and it is told to leave. Ranks ask once a second, so the last time each was heard of tells when a
killed one died.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Wish:
    """What the ranks shall do next; without a reason, go on.

    Attributes:
        reason: Who wants them to stop, in words.
        seconds: How long there is until they are stopped by force; None for as long as it takes.
        moving: Whether the run is to go on at once, on other machines or with more ranks.
        superseded: Whether the asking rank is of an older generation, and must leave unheard.
    """

    reason: str = ""
    seconds: float | None = None
    moving: bool = False
    superseded: bool = False


@dataclass(frozen=True)
class Ending:
    """How a rank ended by itself.

    Attributes:
        generation: Of which start it was.
        rank: Its number.
        status: The exit status it would have had.
        finished: Whether all steps are done.
        moving: Whether it stopped so that the run can go on elsewhere.
        message: For a person; may be empty.
    """

    generation: int
    rank: int
    status: int
    finished: bool = False
    moving: bool = False
    message: str = ""


@dataclass(frozen=True)
class Begun:
    """That a generation takes up the training.

    Attributes:
        generation: Its number, from 1.
        attempt: The number of this start in the run folder.
        ranks: How many there are.
        step: The step it goes on from.
        lost_steps: Steps done before that have to be done again.
        seconds: Since the generation before came to an end; None for the first.
        moved: Whether that one had stopped in order to move.
    """

    generation: int
    attempt: int
    ranks: int
    step: int
    lost_steps: int
    seconds: float | None = None
    moved: bool = False


@dataclass
class News:
    """What the launching process has not heard yet."""

    lines: list[str] = field(default_factory=list[str])
    begun: list[Begun] = field(default_factory=list[Begun])
    endings: list[Ending] = field(default_factory=list[Ending])


class Bridge:
    """The actor; only one generation of ranks at a time is listened to."""

    def __init__(self) -> None:
        self.generation = 0
        self.wish = Wish()
        self.news = News()
        self.arrived = asyncio.Event()
        self.heard: dict[int, float] = {}
        self.lost_at: float | None = None
        self.moved = False
        self.leaving = False

    async def begin(self) -> int:
        """Begin a generation; return its number. Called by rank 0 of every start."""
        if self.generation:
            self.lost_at = min(self.heard.values(), default=time.monotonic())
        self.heard = {}
        # Ranks hear of a machine that goes from Ray itself; of one that comes, from here.
        self.moved, self.leaving = self.leaving or self.wish.moving, False
        if self.wish.moving:
            self.wish = Wish()
        self.generation += 1
        return self.generation

    async def resume(self, begun: Begun) -> None:
        """Note from which step a generation goes on."""
        if begun.generation != self.generation:
            return
        seconds = None if self.lost_at is None else time.monotonic() - self.lost_at
        self.tell().begun.append(replace(begun, seconds=seconds, moved=self.moved))

    async def beat(self, generation: int, rank: int) -> Wish:
        """Hear that a rank lives; tell it what to do."""
        if generation != self.generation:
            return Wish(superseded=True)
        self.heard[rank] = time.monotonic()
        return self.wish

    async def say(self, generation: int, lines: Sequence[str]) -> None:
        """Take lines for the terminal."""
        if generation == self.generation:
            self.tell().lines.extend(lines)

    async def end(self, ending: Ending) -> None:
        """Take how a rank ended."""
        if ending.generation == self.generation:
            self.leaving = self.leaving or ending.moving
            self.tell().endings.append(ending)

    async def stop(self, wish: Wish) -> None:
        """Make the ranks stop after their step; a wish to stop for good wins over one to move."""
        if not (wish.moving and self.wish.reason):
            self.wish = wish

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
    """Start the actor on this machine, which ends with the run anyway; return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Called as functions, the wrappers of Ray have no types.
    actor: Any = ray.remote(Bridge)
    return actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()
