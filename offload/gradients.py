"""Gradients on their way from backward to the update: they leave as soon as they are complete.

A hook on every parameter takes its gradient over: to the host for subgroups that the CPU updates,
beside the rest of backward; into the subgroup's slab on the device for the others. `Tensor.grad` is
then cleared, so device memory for gradients never grows to the size of the model. Gradients of
several backward passes are summed in float32 where they live. Sums of squares are taken on the
device, where the gradient is made.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as distributed
from torch.distributed.tensor import DTensor, Replicate

from interlace.kernels.update import sum_of_squares
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Home
from interlace.offload.subgroup import Member, SubgroupState, local


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
        self.landing: torch.Tensor | None = None
        self.landed: Ticket | None = None

    def reset(self) -> None:
        """Forget the last copy; nothing is under way."""
        self.landed = None

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
            self.send(subgroup, piece, gradient)
        else:
            self.add(subgroup, piece, gradient)
        member.parameter.grad = None
        self.completed(subgroup)

    def send(self, subgroup: SubgroupState, piece: torch.Tensor, gradient: torch.Tensor) -> None:
        """Copy a gradient to its place on the host, beside backward."""
        before = (self.lanes.current_work(), *subgroup.updating, *subgroup.arriving)
        subgroup.arriving.append(self.copy_out(subgroup, piece, gradient, before))

    def add(self, subgroup: SubgroupState, piece: torch.Tensor, gradient: torch.Tensor) -> None:
        """Copy a gradient to the host and add it to what came before."""
        landing = self.landing_for(gradient)
        before = [self.lanes.current_work(), *subgroup.arriving]
        if self.landed is not None:
            before.append(self.landed)
        arrived = self.copy_out(subgroup, landing, gradient, before)

        def add() -> None:
            piece.add_(landing)

        self.landed = self.lanes.cpu.submit(
            add,
            what="gradient sum",
            subgroup=subgroup.index,
            bytes=2 * piece.numel() * piece.element_size(),
            after=(arrived,),
        )
        subgroup.arriving.append(self.landed)

    def copy_out(
        self,
        subgroup: SubgroupState,
        target: torch.Tensor,
        gradient: torch.Tensor,
        before: Sequence[Ticket],
    ) -> Ticket:
        """Submit one copy from the device to the host."""

        def copy() -> None:
            if gradient.device.type == "cuda":
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

    def landing_for(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return host memory for one gradient that is to be added; one buffer serves all."""
        size = gradient.numel()
        if self.landing is None or self.landing.numel() < size:
            if self.landed is not None:
                self.landed.wait()
            self.landing = self.host.empty(size, gradient.dtype)
        if self.landing.dtype is not gradient.dtype:
            return self.host.empty(size, gradient.dtype)
        return self.landing[:size]


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
                for ticket in subgroup.arriving:
                    ticket.wait()
                member.square = sum_of_squares(subgroup.gradient[member.start : member.stop])
            squares.append((member, member.square))
    return squares


def all_finite(subgroup: SubgroupState) -> bool:
    """Whether all gradients of a subgroup that came are finite, on this rank."""
    return all(bool(torch.isfinite(square)) for _, square in squares_of([subgroup]))


def global_norm(subgroups: Iterable[SubgroupState], parameters: Iterable[torch.Tensor]) -> float:
    """Return the 2-norm of all gradients over all shards, the same on every rank.

    Shards of a `DTensor` are summed over the mesh dimensions that shard it; replicas hold the same
    numbers and are not counted twice. `parameters` are all there are, in one order on every rank:
    ranks must meet in the same reductions, whichever gradients came and however subgroups are cut.
    """
    sharded: dict[tuple[distributed.ProcessGroup, ...], list[torch.Tensor]] = {
        sharding_groups(parameter): [] for parameter in parameters
    }
    plain: list[torch.Tensor] = []
    for member, square in squares_of(subgroups):
        groups = sharding_groups(member.parameter)
        (sharded[groups] if groups else plain).append(square.double())
    total = sum_in_order(plain)
    for groups, squares in sharded.items():
        if not groups:
            continue
        part = sum_in_order(squares)
        for group in groups:
            part = part.to(device_of(group))
            distributed.all_reduce(part, group=group)
        total = total + part.cpu()
    return math.sqrt(float(total)) if bool(torch.isfinite(total)) else math.nan


def sum_in_order(squares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum on the CPU, in the order given, with one transfer."""
    if not squares:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([square.reshape(()) for square in squares]).cpu().cumsum(0)[-1]


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
