"""Gradients on their way from backward to the update: they leave as soon as they are complete.

A hook on every parameter takes its gradient over: to the host for subgroups that the CPU updates,
beside the rest of backward; into the subgroup's slab on the device for the others. `Tensor.grad` is
then cleared, so device memory for gradients never grows to the size of the model. Gradients of
several backward passes are summed in float32 where they live: those for the host land in a small
ring of buffers, piece by piece, and are added by the threads that update. Sums of squares are taken
on the device, where the gradient is made.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.tensor import DTensor, Replicate

from interlace.kernels.update import accumulate, sum_of_squares
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Home
from interlace.offload.subgroup import Member, SubgroupState, local

LANDINGS = 4
"""Buffers that gradients to be added land in: copies go on while the CPU adds."""

LANDING_BYTES = 64 * 2**20
"""Size of each; longer gradients come in pieces."""


Tap = Callable[[torch.Tensor, torch.Tensor], bool]
"""Is shown a parameter and its gradient, this rank's part (1-D, live); True drops the gradient, as
if backward had not made it."""


@dataclass
class Landing:
    """Host memory for a piece of a gradient, and the sum that reads it."""

    memory: torch.Tensor
    read: Ticket | None = None


class Gradients:
    """Takes over the gradients of all members of all subgroups.

    Args:
        lanes: Where copies and sums run.
        host: Memory for copies that have to be added to what came before.
        completed: Called with a subgroup whenever a gradient of it was taken over.
    """

    def __init__(
        self, lanes: Lanes, host: HostSlabs, completed: Callable[[SubgroupState], None]
    ) -> None:
        self.lanes = lanes
        self.host = host
        self.completed = completed
        self.landings = deque(Landing(host.empty(0, torch.uint8)) for _ in range(LANDINGS))
        self.tap: Tap | None = None

    @contextmanager
    def tapping(self, tap: Tap) -> Generator[None]:
        """Show every gradient that comes inside the context to `tap`."""
        self.tap = tap
        try:
            yield
        finally:
            self.tap = None

    def take(self, subgroup: SubgroupState, member: Member) -> None:
        """Take over the gradient of one parameter, as left by backward in `Tensor.grad`."""
        gradient = member.parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"a gradient of shape {tuple(gradient.shape)} has layout {gradient.layout}; only "
                "dense gradients can be offloaded (nn.Embedding with sparse=False)"
            )
        gradient = local(gradient).reshape(-1)
        if self.tap is not None and self.tap(member.parameter, gradient):
            member.parameter.grad = None
            return
        if gradient.is_cuda:
            # It may come from another stream, FSDP2's reductions for one.
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
        member.arrivals += 1
        if member.arrivals > 1:
            subgroup.widen_gradient()
        member.square = sum_of_squares(gradient) if member.arrivals == 1 else None
        piece = subgroup.gradient[member.start : member.stop]
        if subgroup.home is not Home.HOST:
            for ticket in subgroup.updating:
                ticket.wait_on_stream()
            merge(piece, gradient, member.arrivals)
        elif member.arrivals == 1:
            self.send(subgroup, member, piece, gradient)
        else:
            self.add(subgroup, member, piece, gradient)
        member.parameter.grad = None
        self.completed(subgroup)

    def send(
        self, subgroup: SubgroupState, member: Member, piece: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Copy a gradient to its place on the host, beside backward."""
        before = [self.lanes.current_work(), *subgroup.updating]
        # A gradient that was dropped may still be on its way.
        before += [member.arriving] if member.arriving is not None else []
        member.arriving = self.copy_out(subgroup, piece, gradient, before)

    def add(
        self, subgroup: SubgroupState, member: Member, piece: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Copy a gradient to the host, piece by piece, and add it to what came before."""
        if not gradient.numel():
            return
        step = LANDING_BYTES // gradient.element_size()
        for part, target in zip(gradient.split(step), piece.split(step), strict=True):
            landing = self.free_landing(part.numel() * part.element_size())
            room = landing.memory.view(part.dtype)[: part.numel()]
            before = [self.lanes.current_work()]
            before += [member.arriving] if member.arriving is not None else []
            arrived = self.copy_out(subgroup, room, part, before)
            member.arriving = landing.read = self.add_up(subgroup, target, room, arrived)

    def add_up(
        self, subgroup: SubgroupState, total: torch.Tensor, values: torch.Tensor, arrived: Ticket
    ) -> Ticket:
        """Submit one sum on the threads of the CPU lane."""

        def add() -> None:
            self.lanes.pool.over_range(
                total.numel(), lambda start, stop: accumulate(total[start:stop], values[start:stop])
            )

        size = 2 * total.numel() * total.element_size() + values.numel() * values.element_size()
        return self.lanes.cpu.submit(
            add,
            what="gradient sum",
            subgroup=subgroup.index,
            bytes=size,
            after=(arrived,),
            # Backward waits for landings and the norm for sums; updates beside backward do not.
            urgent=True,
        )

    def free_landing(self, size: int) -> Landing:
        """Return the landing that was used longest ago, once it has been read: backward may not run
        ahead of the sums with ever more gradients on the device.
        """
        landing = self.landings[0]
        if landing.read is not None:
            landing.read.wait()
        if landing.memory.numel() < size:
            # A power of two fits every dtype, and few sizes come.
            landing.memory = self.host.empty(1 << (size - 1).bit_length(), torch.uint8)
        self.landings.rotate(-1)
        return landing

    def forget_work(self) -> None:
        """Forget what was under way; nothing is any more."""
        for landing in self.landings:
            landing.read = None

    def copy_out(
        self,
        subgroup: SubgroupState,
        target: torch.Tensor,
        gradient: torch.Tensor,
        before: Sequence[Ticket],
    ) -> Ticket:
        """Submit one copy from the device to the host."""

        def copy() -> None:
            if gradient.is_cuda:
                # Its memory must not be given to others before the copy has read it.
                gradient.record_stream(torch.cuda.current_stream(gradient.device))
            target.copy_(gradient, non_blocking=True)

        return self.lanes.d2h.submit(
            copy,
            what="gradient",
            subgroup=subgroup.index,
            bytes=gradient.numel() * gradient.element_size(),
            after=before,
        )


def merge(piece: torch.Tensor, gradient: torch.Tensor, arrivals: int) -> None:
    """Put a gradient into its place on the device: the first is copied, others are added."""
    if arrivals == 1:
        piece.copy_(gradient, non_blocking=True)
    else:
        piece.add_(gradient)


def squares_of(subgroups: Iterable[SubgroupState]) -> list[tuple[Member, torch.Tensor]]:
    """Return the sum of squares of every gradient that came (0-d float64), this rank's part.

    Waits for gradients of several passes, which are summed on the way.
    """
    squares: list[tuple[Member, torch.Tensor]] = []
    for subgroup in subgroups:
        for member in subgroup.members:
            if not member.arrivals:
                continue
            if member.square is None:
                if member.arriving is not None:
                    member.arriving.wait()
                member.square = sum_of_squares(subgroup.gradient[member.start : member.stop])
            squares.append((member, member.square))
    return squares


def all_finite(subgroup: SubgroupState) -> bool:
    """Whether all gradients of a subgroup that came are finite, on this rank."""
    return bool(torch.isfinite(sum_in_order([square for _, square in squares_of([subgroup])])))


def global_norm(subgroups: Iterable[SubgroupState], groups: Sequence[dict[str, Any]]) -> float:
    """Return the 2-norm of all gradients over all shards, the same on every rank.

    Shards of a `DTensor` are summed over the mesh dimensions that shard it; replicas hold the same
    numbers and are not counted twice. The order of the parameter groups decides in which reductions
    ranks meet, whichever gradients came and however subgroups are cut.
    """
    sharded: dict[tuple[distributed.ProcessGroup, ...], list[torch.Tensor]] = {
        sharding_groups(parameter): [] for group in groups for parameter in group["params"]
    }
    plain: list[torch.Tensor] = []
    for member, square in squares_of(subgroups):
        over = sharding_groups(member.parameter)
        (sharded[over] if over else plain).append(square.double())
    total = sum_in_order(plain)
    for over, squares in sharded.items():
        if not over:
            continue
        part = sum_in_order(squares)
        for group in over:
            part = part.to(device_of(group))
            distributed.all_reduce(part, group=group)
        total = total + part.cpu()
    return math.sqrt(float(total)) if bool(torch.isfinite(total)) else math.nan


def sum_in_order(squares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum on the CPU, in the order given, with one transfer; sums of gradients on the
    host are there already.
    """
    if not squares:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    away = [square.reshape(()) for square in squares if square.device.type != "cpu"]
    fetched = iter(torch.stack(away).cpu() if away else ())
    here = [square if square.device.type == "cpu" else next(fetched) for square in squares]
    return torch.stack([square.reshape(()) for square in here]).cumsum(0)[-1]


def sharding_groups(parameter: torch.Tensor) -> tuple[distributed.ProcessGroup, ...]:
    """Return the process groups over which a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(parameter.placements)
        if not isinstance(placement, Replicate)
    )


def device_of(group: distributed.ProcessGroup) -> torch.device:
    """Return the device on which a process group reduces."""
    nccl = distributed.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
