"""The recompute probe: one micro-batch is computed twice, and loss and gradients must be the same
bit for bit.

Silent data corruption (a core or a chip that now and then computes something else) shows in nothing
but a result that does not repeat. The loss alone is not enough: a flipped mantissa bit of a weight
can leave an fp32 loss as it is and change the gradient. So a repetition drops its gradients where
the optimizer would take them over, on the host and reduced over the ranks, and they are compared
with those of the computation that counts. A third computation then tells which of the two was wrong
(the classes are Megatron's): if it agrees with one of them, the fault was `transient`; if with
none, it is `persistent`, or the kernels add in no fixed order, as some of attention on GPUs do.

It costs one forward and backward pass of a micro-batch and host memory for two gradients. The
computation that counts comes last and begins with the same random numbers, so a run with the probe
is bit for bit the run without it. A fault that always gives the same wrong result is not found.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy
import torch

from interlace.offload.gradients import Tap
from interlace.offload.subgroup import local
from interlace.trainer.batches import Batch
from interlace.trainer.checkpoint.state import RandomState
from interlace.trainer.engines.fsdp2 import own_optimizer
from interlace.trainer.objectives import Loss
from interlace.trainer.parts import Parts

Backward = Callable[[Batch], Loss]
"""Runs one micro-batch forward and backward."""

LOSS = "loss"
"""Name of the loss among the tensors that are compared."""


@dataclass
class Computation:
    """What one computation of a micro-batch gave, on the host, by name: this rank's gradients as
    they came, and the loss.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class RecomputeProbe:
    """Computes the first micro-batch of a step twice.

    Args:
        parts: What the run is made of.

    Attributes:
        differing: Bits that differed in the newest step that was probed, by tensor, on this rank.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        named = parts.model.named_parameters()
        self.names: dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
        self.differing: dict[str, int] = {}
        self.batch: Batch | None = None
        self.before: RandomState | None = None
        self.results: tuple[Computation, Computation] | None = None

    def is_due(self, batch: Batch) -> bool:
        """Whether a micro-batch is the first one of a step that is probed."""
        every, plan = self.parts.config.guard.recompute_every_steps, self.parts.plan
        first = batch.rows.start < plan.microbatch_rows * plan.world_size
        return every > 0 and (batch.step + 1) % every == 0 and first

    def twice(self, batch: Batch, backward: Backward) -> Loss:
        """Compute a micro-batch, drop its gradients, and compute it again; return the losses of the
        second computation, which counts. Every rank takes part.
        """
        before = RandomState.capture(self.parts.world.device)
        first = self.dropped(batch, backward, before)
        second = Computation()
        with own_optimizer(self.parts.state.engine).tapping(self.into(second, drop=False)):
            loss = backward(batch)
        second.tensors[LOSS] = on_host(loss.mean_nll)
        self.differing = differing_bits(first, second)
        # Of ranks that agree too: all of them compute a third time if one does not.
        self.batch, self.before, self.results = batch, before, (first, second)
        return loss

    def forget(self) -> None:
        """Let go of what was computed: all ranks agree."""
        self.batch = self.before = self.results = None

    def dropped(self, batch: Batch, backward: Backward, before: RandomState) -> Computation:
        """Compute a micro-batch of which nothing remains: no gradient, no random number drawn,
        nothing that the objective remembers.
        """
        objective, device = self.parts.objective, self.parts.world.device
        remembered = {name: tensor.clone() for name, tensor in objective.state().items()}
        after = RandomState.capture(device)
        before.restore(device)
        found = Computation()
        with own_optimizer(self.parts.state.engine).tapping(self.into(found, drop=True)):
            loss = backward(batch)
        found.tensors[LOSS] = on_host(loss.mean_nll)
        objective.restore(remembered)
        after.restore(device)
        return found

    def into(self, found: Computation, *, drop: bool) -> Tap:
        """Return a tap that copies every gradient."""

        def tap(parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
            found.tensors[self.names[parameter]] = on_host(gradient)
            return drop

        return tap

    def verdict(self, backward: Backward) -> str:
        """Compute a third time, on all ranks; return `transient`, `persistent`, or `agrees` where
        this rank saw no difference. With updates that begin during backward the weights may be
        others by now: `undecided`.
        """
        assert self.batch is not None
        assert self.before is not None
        assert self.results is not None
        if self.parts.state.engine.overlap == "backward":
            return "undecided"
        third = self.dropped(self.batch, backward, self.before)
        if not self.differing:
            return "agrees"
        repeated = any(not differing_bits(each, third) for each in self.results)
        return "transient" if repeated else "persistent"


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of this rank's part on the host."""
    return local(tensor).reshape(-1).to("cpu", copy=True)


def differing_bits(one: Computation, other: Computation) -> dict[str, int]:
    """Return how many bits of each tensor differ; those in which none does are left out, and of a
    tensor that only one computation gave all bits count.
    """
    return {
        name: count
        for name in one.tensors | other.tensors
        if (count := bits_apart(one.tensors, other.tensors, name))
    }


def bits_apart(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], name: str
) -> int:
    """Return how many bits of two tensors of a name differ."""
    there = [tensors[name].view(torch.uint8).numpy() for tensors in (one, other) if name in tensors]
    if len(there) < 2:
        return 8 * len(there[0])
    return int(numpy.bitwise_count(numpy.bitwise_xor(*there)).sum())
