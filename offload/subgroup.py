"""Subgroups with their memory: parameters cut into slabs, and the slabs wherever their home is.

A subgroup holds whole parameters (this rank's shards of them) of one parameter group and one dtype,
back to back. Its state is a set of 1-D slabs by name: `master` (fp32 weights), one per moment of
the update rule, and `remainder` with a split master. What the model's own weights already hold is
not kept twice on the device: weights in fp32 are their own master there, and with a split master
they are its high plane. On the host, where weights are not, the master is always kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from interlace.kernels.update import CoordinateClip, UpdateRule, merge_master, split_master
from interlace.offload.lanes import LaneError, Ticket
from interlace.offload.memory import HostSlabs
from interlace.offload.row_blocks import block_count
from interlace.offload.schedule import Footprint, Home, Subgroup
from interlace.offload.watched import Watched

MASTER, REMAINDER, THRESHOLD, GRADIENT = "master", "remainder", "threshold", "gradient"


@dataclass(frozen=True)
class StateLayout:
    """In which precision state is kept.

    Attributes:
        rule: The update rule; it declares its moments.
        moment_dtype: float32, or bfloat16 with stochastic rounding.
        split_master: Keep the master of bfloat16 weights as the weight and a 16-bit remainder.
        sums_gradients: Keep gradients in float32, because several are summed.
        lent: Masters, moments and gradients are those of another program, which lends them and
            looks at them between steps: a master in float32 is kept in every home, beside weights
            of any float dtype, and gradients arrive where the state lives.
    """

    rule: UpdateRule
    moment_dtype: torch.dtype = torch.float32
    split_master: bool = False
    sums_gradients: bool = False
    lent: bool = False

    @property
    def clips_coordinates(self) -> bool:
        """Whether the rule cuts coordinates, and guards against those that are not finite."""
        return isinstance(self.rule, CoordinateClip)

    @property
    def learns_thresholds(self) -> bool:
        """Whether every tensor has thresholds of its own, from the gradient one step before."""
        return isinstance(self.rule, CoordinateClip) and self.rule.policy == "lagged_quantile"

    def splits(self, weight: torch.dtype) -> bool:
        """Whether weights of this dtype have a split master."""
        return self.split_master and weight is torch.bfloat16

    def weight_is_master(self, weight: torch.dtype) -> bool:
        """Whether the weight is its own master, or the high plane of it."""
        return not self.lent and (weight.itemsize >= 4 or self.splits(weight))

    def slab_dtypes(self, weight: torch.dtype, home: Home) -> dict[str, torch.dtype]:
        """Return the slabs that are kept for weights of this dtype, beside the weights."""
        slabs: dict[str, torch.dtype] = {}
        if self.splits(weight):
            slabs[REMAINDER] = torch.int16
        if home is Home.HOST or not self.weight_is_master(weight):
            slabs[MASTER] = weight if self.weight_is_master(weight) else torch.float32
        moment = torch.float64 if weight is torch.float64 else self.moment_dtype
        return slabs | dict.fromkeys(self.rule.moments, moment)

    def gradient_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return the dtype in which gradients of such weights are kept."""
        return torch.promote_types(weight, torch.float32) if self.sums_gradients else weight

    def footprint(self, weight: torch.dtype, gradient: torch.dtype) -> Footprint:
        """Return bytes per parameter, for the performance model."""
        kept = self.slab_dtypes(weight, Home.HOST).values()
        return Footprint(
            weight=weight.itemsize,
            gradient=gradient.itemsize,
            state=sum(dtype.itemsize for dtype in kept),
            weight_is_master=self.weight_is_master(weight),
            gradient_with_state=self.lent,
        )


@dataclass(eq=False)
class Member:
    """One parameter in a subgroup.

    Attributes:
        parameter: A plain tensor or a `DTensor` shard.
        start: Where its elements begin in the slabs.
        stop: Where they end.
        step: Updates it has had; 0-d float32 on the CPU, as torch's optimizers keep it.
        arrivals: Gradients that came since the last update.
        arriving: The last copy or sum of its gradient, after which it is all there; or None.
        square: Sum of squares of the only gradient that came, or None.
        version: Version counter of the weight after our last write, to notice others'.
        threshold: Where thresholds are learnt: that of each row block of the whole tensor, float32
            on the CPU, the same on all ranks; 0 as long as it is not known. Else None.
    """

    parameter: torch.Tensor
    start: int
    stop: int
    step: torch.Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu")
    )
    arrivals: int = 0
    arriving: Ticket | None = None
    square: torch.Tensor | None = None
    version: int = -1
    threshold: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """This rank's elements as a 1-D view of the parameter's memory."""
        return local(self.parameter).view(-1)

    def shaped(self, piece: torch.Tensor) -> torch.Tensor:
        """Return a piece of a slab in the form of the parameter: its shape, and sharded like it."""
        shaped = piece.view(local(self.parameter).shape)
        if not isinstance(self.parameter, DTensor):
            return shaped
        spec = self.parameter._spec  # pyright: ignore[reportPrivateUsage]
        assert spec.tensor_meta is not None
        meta = TensorMeta(spec.tensor_meta.shape, spec.tensor_meta.stride, piece.dtype)
        # The constructor, unlike from_local, leaves a host tensor on the host.
        return DTensor(  # pyright: ignore[reportCallIssue]
            shaped, DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta), requires_grad=False
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, detached, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class SubgroupState(Watched):
    """One subgroup: its members, its home and its slabs.

    Attributes:
        index: Its number, in the order of updates.
        group: The parameter group of the optimizer, live: hyperparameters are read at every step.
        first_element: Where it begins in the rank's flattened parameter group.
        rounding_seed: Tells the stochastic rounding of this group and shard from all others'.
        home: Where the slabs are.
        slabs: State by name.
        gradient: 1-D, in the weights' dtype or float32, on the host for home `host`.
        upload: With home `host`: what is copied to the weights, in their dtype.
        updating: All work of the last update.
        weights_ready: The ticket after which the weights are new.
    """

    def __init__(
        self,
        members: Sequence[Member],
        group: dict[str, object],
        layout: StateLayout,
        host: HostSlabs,
        first_element: int,
        rounding_seed: int,
    ) -> None:
        super().__init__()
        self.index = -1
        self.members = tuple(members)
        self.group = group
        self.layout = layout
        self.host = host
        self.first_element = first_element
        self.rounding_seed = rounding_seed
        self.weight_dtype = members[0].parameter.dtype
        self.gradient_dtype = layout.gradient_dtype(self.weight_dtype)
        self.device = local(members[0].parameter).device
        self.elements = members[-1].stop
        self.home = Home.HOST
        self.slabs: dict[str, torch.Tensor] = {}
        self.gradient = torch.empty(0, device="cpu")
        self.upload: torch.Tensor | None = None
        self.updating: list[Ticket] = []
        self.weights_ready: Ticket | None = None
        if layout.learns_thresholds:
            for member in self.members:
                count = block_count(group)
                member.threshold = torch.zeros(count, dtype=torch.float32, device="cpu")

    @property
    def shape(self) -> Subgroup:
        """What the performance model needs to know."""
        return Subgroup(
            self.elements, self.layout.footprint(self.weight_dtype, self.gradient_dtype)
        )

    @property
    def entering(self) -> Mapping[str, torch.Tensor]:
        """What is copied into a slot: all slabs, and the gradient where it waits beside them."""
        return {**self.slabs, GRADIENT: self.gradient} if self.layout.lent else self.slabs

    @property
    def casts(self) -> bool:
        """Whether weights are made from the master after the update: no kernel writes float16."""
        return self.weight_dtype is torch.float16

    @property
    def arriving(self) -> list[Ticket]:
        """What has to be done before all gradients that came are there."""
        return [member.arriving for member in self.members if member.arriving is not None]

    def wait(self) -> None:
        """Block until no work of this subgroup is under way."""
        for ticket in (*self.arriving, *self.updating):
            ticket.wait()

    def settle(self) -> None:
        """Block until no work of this subgroup is under way, whether it failed or not."""
        for ticket in (*self.arriving, *self.updating):
            with suppress(LaneError):
                ticket.wait_issued()
            if ticket.ended is not None:
                ticket.ended.synchronize()

    def begin(self, home: Home) -> None:
        """Create the state in its home: master from the weights, moments zero."""
        self.home = home
        for name, dtype in self.layout.slab_dtypes(self.weight_dtype, home).items():
            self.slabs[name] = self.allocate(dtype, on_device=home is Home.RESIDENT)
        self.gradient = self.allocate(self.gradient_dtype, on_device=home is not Home.HOST)
        self.make_upload()
        self.read_weights()

    def allocate(self, dtype: torch.dtype, on_device: bool) -> torch.Tensor:
        """Return zeros for all elements."""
        if on_device:
            return torch.zeros(self.elements, dtype=dtype, device=self.device)
        return self.host.empty(self.elements, dtype)

    def make_upload(self) -> None:
        """Choose what is copied to the weights after an update on the host."""
        if self.home is not Home.HOST:
            self.upload = None
        elif self.weight_dtype is self.slabs[MASTER].dtype:
            self.upload = self.slabs[MASTER]
        else:
            self.upload = self.allocate(self.weight_dtype, on_device=False)

    def move(self, home: Home) -> None:
        """Take the state to another home, exactly; between steps, with no work under way."""
        self.wait()
        if home is self.home:
            return
        wanted = self.layout.slab_dtypes(self.weight_dtype, home)
        moved: dict[str, torch.Tensor] = {}
        for name, dtype in wanted.items():
            present = self.slabs.get(name)
            on_device = home is Home.RESIDENT
            if present is not None and (self.home is Home.RESIDENT) == on_device:
                moved[name] = present
                continue
            moved[name] = self.allocate(dtype, on_device)
            if present is not None:
                moved[name].copy_(present)
            else:
                self.copy_weights_into(moved[name])
        gradient = self.allocate(self.gradient_dtype, on_device=home is not Home.HOST)
        gradient.copy_(self.gradient)
        self.home, self.slabs, self.gradient = home, moved, gradient
        self.make_upload()

    def widen_gradient(self) -> None:
        """Keep the gradient in float32 from now on: several are going to be summed."""
        wide = torch.promote_types(self.weight_dtype, torch.float32)
        if self.gradient_dtype is wide:
            return
        for ticket in self.arriving:
            ticket.wait()
        self.gradient_dtype = wide
        narrow = self.gradient
        self.gradient = self.allocate(wide, on_device=self.home is not Home.HOST)
        self.gradient.copy_(narrow)

    def copy_weights_into(self, slab: torch.Tensor) -> None:
        """Copy the model's weights into a slab."""
        for member in self.members:
            slab[member.start : member.stop].copy_(member.weight)

    def read_weights(self) -> None:
        """Let the master follow the weights where these are not the master's rounded value.

        Weights that somebody else changed (a state dict that was loaded) are taken over; those that
        were not keep their full precision. With a split master the weight is the high plane, so a
        new weight is part of the master by itself; the remainder stays, which is less than half a
        step of the weight.
        """
        self.about_to_change()
        if self.splits and MASTER in self.slabs:
            self.copy_weights_into(self.slabs[MASTER])
        for member in self.members:
            if not self.splits:
                master = self.master_of(member).reshape(-1)
                weight = member.weight.to(master.device)
                changed = master.to(weight.dtype) != weight
                self.keep_master(member, torch.where(changed, weight.to(master.dtype), master))
            member.version = version_of(member.parameter)

    def notice_other_writers(self) -> None:
        """Take weights over that somebody else has written since our last update; with no work
        under way. Writes through `Tensor.data` leave no trace and are not noticed.
        """
        if any(version_of(member.parameter) != member.version for member in self.members):
            self.read_weights()

    @property
    def splits(self) -> bool:
        """Whether the master is kept in two planes."""
        return self.layout.splits(self.weight_dtype)

    def master_of(self, member: Member) -> torch.Tensor:
        """Return a member's weights in full precision, local, in its shape (maybe a copy)."""
        high, remainder = self.planes_of(member)
        if remainder is not None:
            high = merge_master(high.to(remainder.device), remainder)
        return high.view(local(member.parameter).shape)

    def planes_of(self, member: Member) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the memory of a member's master, 1-D: itself, or with a split master its high
        plane and the remainder, which may be on different devices.
        """
        piece = slice(member.start, member.stop)
        high = self.slabs[MASTER][piece] if MASTER in self.slabs else member.weight
        return high, self.slabs[REMAINDER][piece] if self.splits else None

    def set_master(self, member: Member, master: torch.Tensor) -> None:
        """Write a member's weights in full precision, and the model's weights rounded from them."""
        self.about_to_change()
        weight = self.keep_master(member, master.reshape(-1))
        with torch.no_grad():
            member.weight.copy_(weight)
        member.version = version_of(member.parameter)

    def keep_master(self, member: Member, master: torch.Tensor) -> torch.Tensor:
        """Write a master (1-D) into the slabs; return the weight that belongs to it."""
        piece = slice(member.start, member.stop)
        weight = rounded(master, self.weight_dtype, self.splits)
        if self.splits:
            self.slabs[REMAINDER][piece].copy_(split_master(master)[1])
        if MASTER in self.slabs:
            self.slabs[MASTER][piece].copy_(weight if self.splits else master)
        return weight

    def state_of(self, member: Member) -> Mapping[str, torch.Tensor]:
        """Return what belongs into `optimizer.state` of one parameter: views of the slabs.

        A master is listed only where it says more than the weight does.
        """
        own = {
            name: member.shaped(slab[member.start : member.stop])
            for name, slab in self.slabs.items()
            if name != MASTER or not self.layout.weight_is_master(self.weight_dtype)
        }
        learnt = {} if member.threshold is None else {THRESHOLD: member.threshold}
        return {"step": member.step, **own, **learnt}


def rounded(master: torch.Tensor, dtype: torch.dtype, splits: bool) -> torch.Tensor:
    """Return the weight that belongs to a master."""
    return split_master(master)[0] if splits else master.to(dtype)


def version_of(parameter: torch.Tensor) -> int:
    """Return a number that changes with every write to a parameter; a `DTensor` counts what is
    written through itself and what is written to its local memory apart.
    """
    inner = local(parameter)._version
    return inner + parameter._version if isinstance(parameter, DTensor) else inner


def cut(
    groups: Sequence[dict[str, Any]],
    layout: StateLayout,
    host: HostSlabs,
    elements: int,
    is_new: Callable[[torch.Tensor], bool],
    existing: Sequence[SubgroupState],
) -> list[SubgroupState]:
    """Cut the new parameters of all groups into subgroups of about `elements` elements.

    A parameter is never cut: one larger than `elements` is a subgroup of its own. Groups and dtypes
    do not mix.
    """
    subgroups: list[SubgroupState] = []
    for number, group in enumerate(groups):
        first = sum(subgroup.elements for subgroup in existing if subgroup.group is group)
        parameters = [
            parameter for parameter in dict.fromkeys(group["params"]) if is_new(parameter)
        ]
        for members in cut_group(parameters, elements):
            seed = (number << 24) + shard_number(members[0].parameter)
            subgroups.append(SubgroupState(members, group, layout, host, first, seed))
            first += members[-1].stop
    return subgroups


def shard_number(parameter: torch.Tensor) -> int:
    """Return which shard of a parameter this rank has; replicas have the same number."""
    number = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            if not isinstance(placement, Replicate):
                number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


def cut_group(parameters: Sequence[torch.Tensor], elements: int) -> Iterator[list[Member]]:
    """Yield the members of each subgroup of some parameters."""
    taken: list[Member] = []
    for parameter in parameters:
        start, size = (taken[-1].stop if taken else 0), local(parameter).numel()
        other = taken and taken[0].parameter.dtype is not parameter.dtype
        if other or (taken and start + size > elements):
            yield taken
            taken, start = [], 0
        taken.append(Member(parameter, start, start + size))
    if taken:
        yield taken
