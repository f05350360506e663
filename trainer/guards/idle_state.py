"""The check of idle state: optimizer state on the host must be after a forward and backward pass
what it was before. `interlace.offload.idle` has the arithmetic; this decides when.
"""

from collections.abc import Sequence

import torch

from interlace.offload.idle import Change, Checksum, changed, checksums
from interlace.trainer.engines.fsdp2 import own_optimizer
from interlace.trainer.parts import Parts


class IdleState:
    """Takes checksums after the updates of chosen steps and compares them before the next.

    Args:
        parts: What the run is made of.

    Attributes:
        changes: What has changed on this rank since the newest checksums.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.engine = parts.state.engine
        self.taken: list[Checksum] = []
        self.changes: list[Change] = []

    def after_update(self, step: int) -> None:
        """Take checksums after a step, from 0, if it is to be checked; with overlap this waits for
        its update.
        """
        every = self.parts.config.guard.check_state_every_steps
        if every and (step + 1) % every == 0:
            optimizer = own_optimizer(self.engine)
            optimizer.synchronize()
            self.taken = checksums(optimizer.subgroups)

    def before_backward(self) -> None:
        """Compare now where updates begin during backward."""
        if self.engine.overlap == "backward":
            self.compare()

    def before_update(self) -> None:
        """Compare as late as possible where they do not."""
        if self.engine.overlap != "backward":
            self.compare()

    def compare(self) -> None:
        """Compare with the checksums that were taken, if any were, once."""
        taken, self.taken = self.taken, []
        self.changes = changed(taken)

    def described(self) -> list[dict[str, object]]:
        """Return what has changed, for a report: which chunk of which slab, and whose it is."""
        return [
            {
                "subgroup": each.subgroup,
                "slab": each.slab,
                "bytes": [each.start, each.stop],
                "tensors": self.tensors_in(each),
            }
            for each in self.changes
        ]

    def tensors_in(self, change: Change) -> Sequence[str]:
        """Return the names of the parameters whose state a chunk holds."""
        named = self.parts.model.named_parameters()
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
        members = own_optimizer(self.engine).subgroups[change.subgroup].members
        return [
            names[member.parameter]
            for member in members
            if member.start <= change.last_element and member.stop > change.first_element
        ]
