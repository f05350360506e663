"""DeepSpeed's flat partitions, laid into slabs of ours.

ZeRO keeps what a rank updates as a few 1-D tensors in float32: one per parameter group in stages 1
and 2, one per subgroup in stage 3. Each is a key of `optimizer.state` and carries its gradient as
`.grad`. A `Flat` puts exact slabs (pinned, on a GPU) behind such a tensor and what belongs to it;
the tensor object stays, so that whoever holds it sees the slab. One that is longer than a subgroup
should be is cut into pieces, which are updated and interleaved one by one.

Others may put tensors of their own in the place of ours, as `load_state_dict` does. `adopt` notices
and takes their contents over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Home
from interlace.offload.subgroup import GRADIENT, MASTER, Member, StateLayout, SubgroupState
from interlace.offload.watched import Watched

CUTS = 64
"""Elements: pieces begin at multiples of it, so that none begins within a cache line."""

State = dict[torch.Tensor, dict[str, Any]]
"""`optimizer.state`."""


@dataclass(frozen=True, eq=False)
class Lent:
    """One flat partition as DeepSpeed has it.

    Attributes:
        tensor: float32 (n,), with the gradient as `.grad`.
        weight: The model's weights (n,), float32, bfloat16 or float16, on the device.
        group: Number of the parameter group it belongs to.
    """

    tensor: torch.Tensor
    weight: torch.Tensor
    group: int


class Flat(Watched):
    """One flat partition in slabs. Its update announces itself once for all pieces.

    Args:
        lent: What DeepSpeed has.
        group: Its parameter group.
        layout: How state is kept; `lent` is set.
        host: Memory for slabs.
        elements: Length of a piece, about; a partition up to it stays in one.

    Attributes:
        pieces: What is updated one by one.
        slabs: Master, moments and gradient by name, (n,) each.
        scaled_by: By what the last update multiplied gradients, without writing them.
    """

    def __init__(
        self,
        lent: Lent,
        group: dict[str, Any],
        layout: StateLayout,
        host: HostSlabs,
        elements: int,
    ) -> None:
        super().__init__()
        self.lent = lent
        self.layout = layout
        self.host = host
        self.resident = False
        self.scaled_by = 1.0
        self.slabs: dict[str, torch.Tensor] = {}
        whole = lent.tensor.numel()
        self.cuts = cuts_of(whole, elements)
        self.pieces = [
            SubgroupState(
                [Member(lent.weight[start:stop], 0, stop - start)],
                group,
                layout,
                host,
                start,
                lent.group << 24,
            )
            for start, stop in self.cuts
        ]

    def place(self, homes: Sequence[Home], state: State) -> None:
        """Give every piece a home; numbers do not change. A partition is resident as a whole.

        Raises:
            MemoryShortage: The system refuses the memory.
        """
        resident = homes[0] is Home.RESIDENT
        assert all((home is Home.RESIDENT) == resident for home in homes), "resident as a whole"
        before = self.resident, self.slabs
        if resident is not self.resident or not self.slabs:
            self.resident, self.slabs = resident, {}
        try:
            self.adopt(state)
        except BaseException:
            self.resident, self.slabs = before
            raise
        for piece, home in zip(self.pieces, homes, strict=True):
            piece.home = home
            piece.make_upload()

    def adopt(self, state: State) -> bool:
        """Take over what is shown in the place of our slabs; return whether anything was."""
        entry = state.setdefault(self.lent.tensor, {})
        shown: dict[str, torch.Tensor | None] = {
            MASTER: self.lent.tensor.detach(),
            **{name: entry.get(name) for name in self.layout.rule.moments},
            GRADIENT: self.lent.tensor.grad,
        }
        strange = {name: tensor for name, tensor in shown.items() if not self.has(name, tensor)}
        if any(name in self.slabs and name != GRADIENT for name in strange):
            self.about_to_change()
        ours = {name: self.filled(name, tensor) for name, tensor in strange.items()}
        # Where memory was refused nothing has changed.
        for name, slab in ours.items():
            self.show(name, slab, state)
        if ours:
            self.cut()
        return bool(ours)

    def has(self, name: str, shown: torch.Tensor | None) -> bool:
        """Whether what is shown is our slab of that name."""
        slab = self.slabs.get(name)
        if slab is None or shown is None:
            return False
        return shown.data_ptr() == slab.data_ptr() and shown.numel() == slab.numel()

    def filled(self, name: str, source: torch.Tensor | None) -> torch.Tensor:
        """Return our slab of that name with the contents of a tensor, or zeros."""
        slab = self.slabs.get(name)
        if slab is None:
            slab = self.allocate()
        if source is None:
            slab.zero_()
        else:
            slab.copy_(source.view(-1))
        return slab

    def allocate(self) -> torch.Tensor:
        """Return zeros (n,) in float32 where this partition lives."""
        count = self.lent.tensor.numel()
        if self.resident:
            return torch.zeros(count, dtype=torch.float32, device=self.lent.weight.device)
        return self.host.empty(count, torch.float32)

    def show(self, name: str, slab: torch.Tensor, state: State) -> None:
        """Put a slab where DeepSpeed looks for what it holds."""
        tensor = self.lent.tensor
        self.slabs[name] = slab
        if name == MASTER:
            # A gradient has to be where its tensor is; it follows.
            gradient, tensor.grad = tensor.grad, None
            tensor.data = slab
            if gradient is not None and gradient.device == slab.device:
                tensor.grad = gradient
        elif name == GRADIENT:
            tensor.grad = slab
        else:
            state[tensor][name] = slab

    def cut(self) -> None:
        """Give every piece its part of the slabs."""
        own = {name: slab for name, slab in self.slabs.items() if name != GRADIENT}
        for piece, (start, stop) in zip(self.pieces, self.cuts, strict=True):
            piece.slabs = {name: slab[start:stop] for name, slab in own.items()}
            piece.gradient = self.slabs[GRADIENT][start:stop]

    def scale_idle(self, parts: Sequence[slice]) -> None:
        """Write what the last update multiplied gradients by, where none came since.

        DeepSpeed scales gradients in place and uses what it has once more for parameters that took
        no part in a step.
        """
        if self.scaled_by != 1.0:
            for part in parts:
                self.slabs[GRADIENT][part].mul_(self.scaled_by)

    def follow(self, lent: Lent, group: dict[str, Any]) -> None:
        """Use what DeepSpeed has now: its groups and weights may be other objects than before."""
        self.lent = lent
        for piece, (start, stop) in zip(self.pieces, self.cuts, strict=True):
            piece.group = group
            piece.members[0].parameter = lent.weight[start:stop]


def cuts_of(whole: int, elements: int) -> list[tuple[int, int]]:
    """Return where the pieces of a partition begin and end: as few as there can be of at most about
    `elements`, all of about one length.
    """
    count = max(1, -(-whole // elements))
    even = -(-whole // count)
    size = max(CUTS, -(-even // CUTS) * CUTS)
    return [(start, min(start + size, whole)) for start in range(0, whole, size)]
