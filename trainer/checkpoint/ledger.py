"""Copy on write for a snapshot: state is read from live memory while training goes on, and whoever
is about to change a piece of it sees to it that the snapshot has it first.

The state is cut into chunks, in the order in which they are written. A chunk is owed until it is
written. The writer takes one after another straight from live memory. An update claims all chunks
of its subgroup before it begins (`Watched.before_change`): what is still owed is copied into
a pool of bounded size, and where the pool is full the update waits for the writer. Taking and
claiming are one atomic decision per chunk, so that writer and update never touch the same bytes.
Should this ever fail, the versions tell: a chunk whose subgroup has begun to change by the end of
its reading spoils the whole checkpoint, which is then abandoned.

After DataStates-LLM (arXiv 2601.16956) and CheckFreq (FAST 2021), which copy lazily while state
does not change; the pool is what lets it change.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

import torch

from interlace.offload.memory import available_host_bytes
from interlace.offload.watched import Watched
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.live import Source
from interlace.trainer.errors import SaveError

CHUNK_BYTES = 16 * 2**20

COPIED_SHARE = 0.1
"""Share of a rank's state that updates may copy, where nobody says otherwise."""

LEAST_POOL_BYTES = 4 * CHUNK_BYTES
"""Below this it would not pay to let updates wait."""


GIVEN_UP = "this save was given up"
"""Why a rank has no file that was asked to stop writing."""


class Holding(Enum):
    """Where the bytes of a chunk are."""

    LIVE = auto()
    """In live memory only."""

    IN_USE = auto()
    """In live memory, and somebody is reading them there."""

    COPIED = auto()
    """In the pool."""

    DONE = auto()
    """Written; nobody needs them any more."""


@dataclass(eq=False)
class Chunk:
    """Elements `start` to `stop` of one source."""

    source: Source
    start: int
    stop: int
    holding: Holding = Holding.LIVE
    copy: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size in a checkpoint."""
        return (self.stop - self.start) * self.source.placed.dtype.itemsize


class Pool:
    """Host memory for copies; what was given back is used again by the next snapshot.

    Args:
        budget_bytes: Most memory that it ever holds; None for a tenth of what is saved.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self.wanted = budget_bytes
        self.budget_bytes = budget_bytes or 0
        self.held_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}

    def provide_for(self, saved_bytes: int) -> None:
        """Learn how much is saved at once; where nobody said how much may be copied, it is never
        more than half of the memory that is free.
        """
        if self.wanted is None:
            room = self.held_bytes + available_host_bytes() // 2
            self.budget_bytes = min(max(int(COPIED_SHARE * saved_bytes), LEAST_POOL_BYTES), room)

    def take(self, size: int) -> torch.Tensor | None:
        """Return `size` bytes, or None if there is no room."""
        if free := self._free.get(size):
            return free.pop()
        self._drop_free(size)
        if self.held_bytes + size > self.budget_bytes:
            return None
        self.held_bytes += size
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def give_back(self, memory: torch.Tensor) -> None:
        """Take memory back."""
        self._free.setdefault(memory.numel(), []).append(memory)

    def _drop_free(self, needed: int) -> None:
        """Make room by giving memory of other sizes back to the system."""
        for size, free in self._free.items():
            while free and self.held_bytes + needed > self.budget_bytes:
                free.pop()
                self.held_bytes -= size


class Ledger:
    """The chunks of one snapshot, and who has them.

    Args:
        sources: What is saved, in the order of the file.
        pool: Room for copies.

    Attributes:
        claiming_seconds: How long updates were held up, copying or waiting.
        copied_bytes: What updates copied.
        torn: What somebody changed behind our back, if anything: the checkpoint is spoilt.
    """

    def __init__(self, sources: Iterable[Source], pool: Pool) -> None:
        self.pool = pool
        self.chunks = [chunk for source in sources for chunk in cut(source)]
        self.claiming_seconds = 0.0
        self.copied_bytes = 0
        self.torn: Source | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._of: dict[Watched, list[Chunk]] = {}
        for chunk in self.chunks:
            live = chunk.source.live
            if live is not None and live.owner is not None:
                self._of.setdefault(live.owner, []).append(chunk)
        for owner in self._of:
            owner.before_change = self.claim

    # ---- the writer ---------------------------------------------------------------------------

    def contents(self) -> Iterator[memoryview]:
        """Yield all bytes in order; each piece must be used before the next is asked for. One
        thread does this, once.

        Raises:
            SaveError: Somebody changed the state behind our back, or the snapshot was given up.
        """
        try:
            for chunk in self.chunks:
                failpoint("snap.chunk")
                self._require_whole()
                memory = self._taken(chunk)
                if memory.numel():
                    yield memoryview(cast(bytes, memory.view(torch.uint8).numpy()))
                self._settle(chunk)
            self._require_whole()
        finally:
            self.close()

    def _require_whole(self) -> None:
        if self.torn is not None:
            raise SaveError(
                f"{self.torn.name} was changed while it was being saved, so that the checkpoint "
                "would hold parts of two steps; it was given up. Whatever writes to the state "
                "between steps has to call Watched.about_to_change first"
            )

    def _taken(self, chunk: Chunk) -> torch.Tensor:
        """Return the bytes of a chunk: a copy, or live memory that is in use from now on."""
        with self._changed:
            while chunk.holding is Holding.IN_USE and not self._closed:
                self._changed.wait()
            if self._closed:
                raise SaveError(GIVEN_UP)
            if chunk.copy is not None:
                return chunk.copy
            chunk.holding = Holding.IN_USE
        memory = chunk.source.read(chunk.start, chunk.stop)
        if not chunk.source.is_read_in_place:
            self._settle(chunk)
        return memory

    def _settle(self, chunk: Chunk) -> None:
        """Take note that a chunk is not needed any more, after a look at its version."""
        with self._changed:
            if chunk.holding is Holding.IN_USE:
                self._look_at_version(chunk)
            if chunk.copy is not None:
                self.pool.give_back(chunk.copy)
                chunk.copy = None
            chunk.holding = Holding.DONE
            self._changed.notify_all()

    # ---- updates ------------------------------------------------------------------------------

    def claim(self, owner: Watched) -> None:
        """Return once this snapshot needs nothing of an owner's live memory any more."""
        owed = [each for each in self._of.get(owner, ()) if each.holding is not Holding.DONE]
        if not owed:
            return
        began = time.perf_counter()
        # What there is room for is copied before anything is waited for.
        left = [chunk for chunk in owed if not self._secured(chunk, wait=False)]
        for chunk in left:
            self._secured(chunk, wait=True)
        self.claiming_seconds += time.perf_counter() - began

    def _secured(self, chunk: Chunk, wait: bool) -> bool:
        """Make live memory free of one chunk; return whether it is."""
        with self._changed:
            while True:
                if self._closed or chunk.holding in (Holding.COPIED, Holding.DONE):
                    return True
                room = self.pool.take(chunk.bytes) if chunk.holding is Holding.LIVE else None
                if room is not None:
                    break
                if not wait:
                    return False
                self._changed.wait()
            chunk.holding = Holding.IN_USE
        copy = room.view(chunk.source.placed.dtype).copy_(
            chunk.source.read(chunk.start, chunk.stop)
        )
        with self._changed:
            self._look_at_version(chunk)
            chunk.copy, chunk.holding = copy.view(torch.uint8), Holding.COPIED
            self.copied_bytes += chunk.bytes
            self._changed.notify_all()
        return True

    def _look_at_version(self, chunk: Chunk) -> None:
        """Remember if somebody began to change a chunk before it was read; an update must not fail
        of it, the save must.
        """
        if not chunk.source.intact:
            self.torn = self.torn or chunk.source

    # ---- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Owe nothing any more; whoever waits goes on. May be called again, by any thread."""
        with self._changed:
            self._closed = True
            for chunk in self.chunks:
                if chunk.copy is not None:
                    self.pool.give_back(chunk.copy)
                    chunk.copy = None
            self._changed.notify_all()
        for owner in self._of:
            if owner.before_change == self.claim:
                owner.before_change = None


def cut(source: Source) -> Iterator[Chunk]:
    """Yield the chunks of a source, in order."""
    elements, step = source.memory.numel(), max(1, CHUNK_BYTES // source.placed.dtype.itemsize)
    for start in range(0, elements, step):
        yield Chunk(source, start, min(start + step, elements))
