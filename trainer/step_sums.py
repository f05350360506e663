"""What the ranks tell each other once in every step, in one exchange.

One vector is summed over the ranks: the loss, whatever the objective and the experts report, and
flags by which all ranks agree on what to do next (stop, publish a checkpoint), so that none of them
ever decides alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from interlace.trainer.objectives import Loss
from interlace.trainer.world import World


@dataclass(frozen=True)
class Exchanged:
    """What an exchange brought, the same on every rank.

    Attributes:
        loss: Mean over ranks, nats per token.
        flags: Number of ranks that raised each flag; a flag may be a number, then their sum.
        details: Means over ranks of what the objective reports.
        loads: Sums over ranks of the tokens that went to each expert, float64.
        seconds: What every rank gave as the seconds of its own work, in rank order.
    """

    loss: float
    flags: Mapping[str, float]
    details: dict[str, float]
    loads: list[torch.Tensor]
    seconds: list[float]


class StepSums:
    """What the micro-batches of one rank add up to in one step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.details: dict[str, float] = {}
        self.loads: list[torch.Tensor] = []

    def add(self, loss: Loss, accumulation: int) -> None:
        """Count one of `accumulation` micro-batches."""
        self.loss += float(loss.mean_nll.detach()) / accumulation
        for name, value in loss.details.items():
            share = float(value.detach()) / accumulation
            self.details[name] = self.details.get(name, 0.0) + share
        loads = [load.cpu().double() for load in loss.expert_loads]
        before = self.loads or [torch.zeros_like(load) for load in loads]
        self.loads = [total + load for total, load in zip(before, loads, strict=True)]

    def exchange(self, world: World, flags: Mapping[str, float], seconds: float = 0.0) -> Exchanged:
        """Add up over all ranks; each gives the same flags in the same order, and its seconds."""
        head = torch.tensor(
            [self.loss, *flags.values(), *self.details.values()], dtype=torch.float64
        )
        # Each rank adds to its own place only, so the sum holds what every one of them gave.
        own = torch.zeros(world.size, dtype=torch.float64)
        own[world.rank] = seconds
        total = world.sum(torch.cat([head, own, *self.loads]))
        counts = [1, len(flags), len(self.details), world.size]
        sizes = [*counts, *(len(load) for load in self.loads)]
        loss, raised, details, of_ranks, *loads = total.split(sizes)
        return Exchanged(
            loss=float(loss) / world.size,
            flags=dict(zip(flags, raised.tolist(), strict=True)),
            details={
                name: value / world.size
                for name, value in zip(self.details, details.tolist(), strict=True)
            },
            loads=list(loads),
            seconds=of_ranks.tolist(),
        )
