"""Runs the update of one subgroup after another on the lanes, each as its home says.

`host`: the CPU updates the slab in one pass, then the new weights are copied up. `staged`: the
state is copied into a slot on the device, updated there, and copied back; with two slots or more
the copies of one subgroup run under the update of another. `resident`: updated where it is. Every
element goes through the same arithmetic in the same order wherever it is updated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from interlace.kernels.update import Slab, Step, update, update_many
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.schedule import Home
from interlace.offload.subgroup import MASTER, REMAINDER, Member, SubgroupState, version_of


@dataclass(frozen=True)
class Work:
    """One subgroup's update: hyperparameters as they were when it was launched."""

    subgroup: SubgroupState
    scale: float
    hyper: Mapping[str, object]
    runs: tuple[tuple[int, int, int], ...]
    arrived: tuple[Member, ...]

    @classmethod
    def of(cls, subgroup: SubgroupState, scale: float) -> "Work":
        """Take a snapshot of what the update depends on."""
        # Schedulers write new rates into the same tensor, and the update reads them later.
        hyper = {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in subgroup.group.items()
            if key not in ("params", "param_names")
        }
        arrived = tuple(member for member in subgroup.members if member.arrivals)
        return cls(subgroup, scale, hyper, tuple(subgroup.runs()), arrived)

    def step(self, number: int, first_element: int) -> Step:
        """Return the scalars of the update after `number` updates."""
        return Step(
            number=number + 1,
            gradient_scale=self.scale,
            hyper=self.hyper,
            rounding_seed=self.subgroup.rounding_seed,
            first_element=first_element,
        )


ALIGNMENT = 256
"""Bytes: slabs begin where a device reads them at full speed."""


@dataclass
class Slot:
    """Device memory that staged subgroups pass through, each cutting it as it needs."""

    memory: torch.Tensor
    freed: tuple[Ticket, ...] = ()

    def cut(self, slabs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return room for every slab, by name."""
        room: dict[str, torch.Tensor] = {}
        start = 0
        for name, slab in slabs.items():
            stop = start + slab.numel() * slab.element_size()
            room[name] = self.memory[start:stop].view(slab.dtype)
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        return room


def slot_bytes(slabs: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of a slot that all slabs of a subgroup fit into."""
    return sum(-(-s.numel() * s.element_size() // ALIGNMENT) * ALIGNMENT for s in slabs.values())


class Executor:
    """Launches updates on the lanes of one rank.

    Args:
        lanes: Where the work runs.
        slots: Number of staging slots, at least 1.
    """

    def __init__(self, lanes: Lanes, slots: int) -> None:
        self.lanes = lanes
        self.slots = [Slot(self.memory(0)) for _ in range(slots)]
        self.turn = 0

    def memory(self, size: int) -> torch.Tensor:
        """Return so many bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.lanes.device)

    def make_slots(self, subgroups: Sequence[SubgroupState]) -> None:
        """Give every slot room for the largest staged subgroup; between steps only."""
        staged = (subgroup for subgroup in subgroups if subgroup.home is Home.STAGED)
        size = max((slot_bytes(subgroup.slabs) for subgroup in staged), default=0)
        for slot in self.slots:
            if slot.memory.numel() != size:
                slot.memory = self.memory(0)
                slot.memory = self.memory(size)
        if self.lanes.device.type == "cuda":
            # What used this memory before may still be under way; copies into it will not wait.
            torch.cuda.synchronize(self.lanes.device)

    def forget_work(self) -> None:
        """Forget what passed through the slots; nothing is under way."""
        for slot in self.slots:
            slot.freed = ()

    def launch(self, work: Work) -> None:
        """Submit all work of one subgroup's update; return at once."""
        subgroup = work.subgroup
        match subgroup.home:
            case Home.HOST:
                tickets = self.on_host(work)
                subgroup.weights_ready = tickets[-1]
            case Home.STAGED:
                tickets = self.through_slot(work)
                subgroup.weights_ready = tickets[1]
            case Home.RESIDENT:
                tickets = [self.on_device(work, subgroup.slabs, (self.lanes.current_work(),))]
                subgroup.weights_ready = tickets[0]
        subgroup.updating = tickets
        for member in work.arrived:
            member.arriving = None

    def on_host(self, work: Work) -> list[Ticket]:
        """Update on the CPU, then copy the weights up."""
        subgroup, issued = work.subgroup, self.lanes.current_work()
        updated = self.lanes.cpu.submit(
            partial(self.update_on_host, work),
            what="update",
            subgroup=subgroup.index,
            bytes=subgroup.elements * subgroup.shape.footprint.host_update,
            after=(*subgroup.arriving, *subgroup.updating),
        )
        uploaded = self.lanes.h2d.submit(
            partial(upload_weights, work),
            what="weights",
            subgroup=subgroup.index,
            bytes=subgroup.elements * subgroup.weight_dtype.itemsize,
            # Whatever was issued before may still read the old weights.
            after=(updated, issued),
        )
        return [updated, uploaded]

    def update_on_host(self, work: Work) -> None:
        """Share the slab over the threads of the pool."""
        subgroup = work.subgroup
        upload = None if subgroup.upload is subgroup.slabs[MASTER] else subgroup.upload
        slab = Slab(
            gradient=subgroup.gradient,
            master=subgroup.slabs[MASTER],
            moments=tuple(subgroup.slabs[name] for name in subgroup.layout.rule.moments),
            weight=upload,
            remainder=subgroup.slabs.get(REMAINDER),
        )

        def share(start: int, stop: int) -> None:
            for first, last, number in work.runs:
                low, high = max(start, first), min(stop, last)
                if low < high:
                    step = work.step(number, subgroup.first_element)
                    update(subgroup.layout.rule, slab, step, start=low, stop=high)

        self.lanes.pool.over_range(subgroup.elements, share)

    def through_slot(self, work: Work) -> list[Ticket]:
        """Copy the state in, update it on the device, copy it back."""
        subgroup = work.subgroup
        slot = self.slots[self.turn % len(self.slots)]
        self.turn += 1
        inside = slot.cut(subgroup.slabs)
        size = sum(slab.numel() * slab.element_size() for slab in subgroup.slabs.values())
        issued = self.lanes.current_work()
        copied_in = self.lanes.h2d.submit(
            partial(copy_all, inside, subgroup.slabs),
            what="copy in",
            subgroup=subgroup.index,
            bytes=size,
            after=(*slot.freed, *subgroup.updating),
            completely=True,
        )
        # What holds a slot goes before resident subgroups, which can wait.
        updated = self.on_device(work, inside, (copied_in, issued), in_slot=True)
        copied_out = self.lanes.d2h.submit(
            partial(copy_all, subgroup.slabs, inside),
            what="copy out",
            subgroup=subgroup.index,
            bytes=size,
            after=(updated,),
            completely=True,
        )
        slot.freed = (copied_out,)
        return [copied_in, updated, copied_out]

    def on_device(
        self,
        work: Work,
        slabs: Mapping[str, torch.Tensor],
        after: Sequence[Ticket],
        in_slot: bool = False,
    ) -> Ticket:
        """Update slabs that are on the device."""
        subgroup = work.subgroup
        return self.lanes.compute.submit(
            partial(update_members, work, slabs),
            what="update",
            subgroup=subgroup.index,
            bytes=subgroup.elements * subgroup.shape.footprint.device_update,
            after=(*after, *subgroup.updating),
            urgent=in_slot,
            completely=in_slot,
        )


def update_members(work: Work, slabs: Mapping[str, torch.Tensor]) -> None:
    """Update every parameter of a subgroup on the device, writing its weight directly; short ones
    share a launch.
    """
    subgroup = work.subgroup
    members = [member for member in work.arrived if member.start < member.stop]
    pieces: list[Slab] = []
    steps: list[Step] = []
    for member in members:
        piece = slice(member.start, member.stop)
        pieces.append(
            Slab(
                gradient=subgroup.gradient[piece],
                master=slabs[MASTER][piece] if MASTER in slabs else member.weight,
                moments=tuple(slabs[name][piece] for name in subgroup.layout.rule.moments),
                weight=member.weight if MASTER in slabs else None,
                remainder=slabs[REMAINDER][piece] if REMAINDER in slabs else None,
            )
        )
        number = next(done for start, stop, done in work.runs if start <= member.start < stop)
        steps.append(work.step(number, subgroup.first_element + member.start))
    update_many(subgroup.layout.rule, pieces, steps)
    for member in members:
        member.version = version_of(member.parameter)


def upload_weights(work: Work) -> None:
    """Copy new weights from the host to the parameters that were updated."""
    upload = work.subgroup.upload
    assert upload is not None
    for member in work.arrived:
        member.weight.copy_(upload[member.start : member.stop], non_blocking=True)
        member.version = version_of(member.parameter)


def copy_all(targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Copy every named slab."""
    for name, target in targets.items():
        target.copy_(sources[name], non_blocking=True)
