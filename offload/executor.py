"""Runs the update of one subgroup after another on the lanes, each as its home says.

`host`: the CPU updates the slab in one pass, then the new weights are copied up. `staged`: the
state is copied into a slot on the device, updated there, and copied back; with two slots or more
the copies of one subgroup run under the update of another. `resident`: updated where it is. Every
element goes through the same arithmetic in the same order wherever it is updated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from interlace.kernels.update import Slab, Step, update, update_many
from interlace.kernels.update.histogram import magnitude_histogram
from interlace.kernels.update.limit import Count
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.schedule import Home
from interlace.offload.segments import Segment, merged, segments_of
from interlace.offload.subgroup import (
    GRADIENT,
    MASTER,
    REMAINDER,
    Member,
    SubgroupState,
    version_of,
)


@dataclass
class Findings:
    """What an update learns of the gradients it uses, filled by who updates.

    Attributes:
        clipped: Segments and how many of their coordinates were clipped, several parts of one among
            them; numbers of a device are read when somebody wants them.
        histograms: Segments and the magnitudes in a part of their gradient.
    """

    clipped: list[tuple[Segment, Count]] = field(default_factory=list[tuple[Segment, Count]])
    histograms: list[tuple[Segment, torch.Tensor]] = field(
        default_factory=list[tuple[Segment, torch.Tensor]]
    )


@dataclass(frozen=True)
class Work:
    """One subgroup's update: hyperparameters as they were when it was launched.

    Attributes:
        subgroup: What is updated.
        scale: Gradients are multiplied by this first.
        segments: Runs of elements that are updated alike.
        arrived: Parameters whose gradient came.
        findings: Where the rule clips coordinates, what is learnt of them.
    """

    subgroup: SubgroupState
    scale: float
    segments: tuple[Segment, ...]
    arrived: tuple[Member, ...]
    findings: Findings | None

    @classmethod
    def of(cls, subgroup: SubgroupState, scale: float, threshold: float | None = None) -> "Work":
        """Take a snapshot of what the update depends on; see `segments_of` for the threshold."""
        segments = segments_of(subgroup, threshold)
        # What was clipped is told of every parameter; and a device has their weights one by one.
        findings = Findings() if subgroup.layout.clips_coordinates else None
        if findings is None and subgroup.home is Home.HOST:
            segments = merged(segments)
        arrived = tuple(member for member in subgroup.members if member.arrivals)
        return cls(subgroup, scale, tuple(segments), arrived, findings)

    def step(self, segment: Segment, start: int) -> Step:
        """Return the scalars of a segment's update, for the part that begins at `start`."""
        return Step(
            number=segment.number,
            gradient_scale=self.scale,
            hyper=segment.hyper,
            rounding_seed=self.subgroup.rounding_seed,
            first_element=self.subgroup.first_element + start,
        )

    def measure(self, segment: Segment, gradient: torch.Tensor) -> None:
        """Where thresholds follow the gradient, measure a part of it (1-D)."""
        if self.findings is not None and self.subgroup.layout.learns_thresholds:
            found = magnitude_histogram(gradient, self.scale)
            self.findings.histograms.append((segment, found))

    def count(self, segment: Segment, clipped: Count) -> None:
        """Take note of clipped coordinates; many threads do."""
        if self.findings is not None:
            self.findings.clipped.append((segment, clipped))


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
        size = max((slot_bytes(subgroup.entering) for subgroup in staged), default=0)
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
        subgroup.about_to_change()
        upload = None if subgroup.upload is subgroup.slabs[MASTER] else subgroup.upload
        cast = upload if subgroup.casts else None
        slab = Slab(
            gradient=subgroup.gradient,
            master=subgroup.slabs[MASTER],
            moments=tuple(subgroup.slabs[name] for name in subgroup.layout.rule.moments),
            weight=None if cast is not None else upload,
            remainder=subgroup.slabs.get(REMAINDER),
        )

        def share(start: int, stop: int) -> None:
            for segment in work.segments:
                low, high = max(start, segment.start), min(stop, segment.stop)
                if low < high:
                    work.measure(segment, slab.gradient[low:high])
                    step = work.step(segment, 0)
                    cut = update(subgroup.layout.rule, slab, step, start=low, stop=high)
                    work.count(segment, cut)
                    if cast is not None:
                        cast_into(cast[low:high], slab.master[low:high])

        self.lanes.pool.over_range(subgroup.elements, share)

    def through_slot(self, work: Work) -> list[Ticket]:
        """Copy the state in, update it on the device, copy it back."""
        subgroup = work.subgroup
        slot = self.slots[self.turn % len(self.slots)]
        self.turn += 1
        entering = subgroup.entering
        inside = slot.cut(entering)
        leaving = {name: inside[name] for name in subgroup.slabs}
        issued = self.lanes.current_work()
        copied_in = self.lanes.h2d.submit(
            partial(copy_all, inside, entering),
            what="copy in",
            subgroup=subgroup.index,
            bytes=bytes_of(entering),
            after=(*slot.freed, *subgroup.updating, *subgroup.arriving),
            completely=True,
        )
        # What holds a slot goes before resident subgroups, which can wait.
        updated = self.on_device(work, inside, (copied_in, issued), in_slot=True)
        copied_out = self.lanes.d2h.submit(
            partial(copy_all, subgroup.slabs, leaving),
            what="copy out",
            subgroup=subgroup.index,
            bytes=bytes_of(leaving),
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
    subgroup, rule = work.subgroup, work.subgroup.layout.rule
    # Of staged state too, which changes only when it is copied back: the weights change now.
    subgroup.about_to_change()
    pieces = [device_piece(subgroup, segment, slabs) for segment in work.segments]
    steps = [work.step(segment, segment.start) for segment in work.segments]
    for segment, piece in zip(work.segments, pieces, strict=True):
        work.measure(segment, piece.gradient)
    for segment, cut in zip(work.segments, update_many(rule, pieces, steps), strict=True):
        work.count(segment, cut)
    if subgroup.casts:
        for segment in work.segments:
            piece = slice(segment.start, segment.stop)
            weight_of(segment).copy_(slabs[MASTER][piece])
    for member in work.arrived:
        member.version = version_of(member.parameter)


def weight_of(segment: Segment) -> torch.Tensor:
    """Return the weights of a segment, 1-D, where the model has them."""
    first = segment.member.start
    return segment.member.weight[segment.start - first : segment.stop - first]


def device_piece(
    subgroup: SubgroupState, segment: Segment, slabs: Mapping[str, torch.Tensor]
) -> Slab:
    """Return the slab of one segment, given a subgroup's slabs on the device."""
    piece = slice(segment.start, segment.stop)
    weight = weight_of(segment)
    return Slab(
        gradient=slabs.get(GRADIENT, subgroup.gradient)[piece],
        master=slabs[MASTER][piece] if MASTER in slabs else weight,
        moments=tuple(slabs[name][piece] for name in subgroup.layout.rule.moments),
        weight=weight if MASTER in slabs and not subgroup.casts else None,
        remainder=slabs[REMAINDER][piece] if REMAINDER in slabs else None,
    )


def cast_into(weights: torch.Tensor, master: torch.Tensor) -> None:
    """Round a part of a master to nearest even, on the calling thread alone."""
    # Torch would start threads of its own on every thread of the pool. What float16 cannot hold
    # becomes infinite, as it does there.
    with np.errstate(over="ignore"):
        weights.numpy()[:] = master.numpy()


def bytes_of(slabs: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of all slabs together."""
    return sum(slab.numel() * slab.element_size() for slab in slabs.values())


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
