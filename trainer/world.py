"""The ranks of a run as a value: who I am, how many we are, on which device, and how we agree.

A `World` is passed to whatever needs it; nothing reads ranks from globals. `process_group` opens
the world that the environment describes (torchrun sets RANK, WORLD_SIZE and LOCAL_RANK) and closes
it again.
"""

import gc
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.distributed.rendezvous import rendezvous

from interlace.trainer.errors import UserError

Value = TypeVar("Value")

# Long enough for rank 0 to tokenise a corpus while the others wait for it; `limit_waiting` shortens
# it once that is done.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes of one run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, reports and decides."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's `value` (anything that pickles; the peers are this run's own ranks)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 and return its result on every rank; a `UserError` reaches all
        ranks.
        """
        if self.size == 1:
            return action()
        outcome: tuple[Value | None, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (action(), None)
            except UserError as error:
                outcome = (None, error)
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return cast(Value, result)

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all ranks (same shape and dtype on each)."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


@contextmanager
def process_group() -> Generator[World]:
    """Open the world that the environment describes: one process, or the ranks torchrun started.

    Yields:
        This process's `World`. With several ranks the default process group (gloo on CPUs, NCCL
        with gloo for host tensors on GPUs) exists inside the context and is destroyed after it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(rendezvous("env://", rank, size, timeout=COLLECTIVE_TIMEOUT))
    # After a restart torchrun's store still holds the addresses of ranks that are gone; who is
    # quicker than a peer would read the old one and be refused.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"start-{start}", store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        yield World(rank, size, device)
    finally:
        # Sharded models keep their groups alive in reference cycles.
        gc.collect()
        dist.destroy_process_group()


def limit_waiting(world: World, limit: timedelta) -> None:
    """Let no collective from now on wait longer than this for another rank.

    Torch has no public call for groups that exist; what it has covers gloo and NCCL alike.
    """
    if world.size > 1:
        for group in _groups():
            dist.distributed_c10d._set_pg_timeout(limit, group)  # pyright: ignore[reportPrivateUsage]


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage]
