"""Rows of earlier steps and the candidates they ended with, from which descents go on.

A step's rows are known by number, and row `i` replays what row `i` of an earlier step ended with,
drawn evenly among those that are kept. So whoever has a row has all it may replay, for any number
of ranks. What is kept is on the host. Published as a first-in-first-out buffer of whole batches
(arXiv 2507.02092, appendix); here each replaying row has a ring of its own, which is the same
lifetime.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from interlace.trainer.batches import Batch
from interlace.trainer.models.initial import generator_of
from interlace.trainer.world import World


@dataclass(frozen=True)
class Shape:
    """What a buffer holds.

    Attributes:
        rows: Numbers of the rows that replay.
        depth: Earlier steps that each of them can go back.
        length: T.
        vocabulary_size: V.
        documents: Whether rows come with documents.
    """

    rows: Sequence[int]
    depth: int
    length: int
    vocabulary_size: int
    documents: bool


class ReplayBuffer:
    """The kept rows; as tensors (depth, rows, T) and (depth, rows, T, V) on the host.

    A rank fills the places of its own rows, in every step all of them. `state` brings all ranks'
    places together.
    """

    def __init__(self, shape: Shape, world: World) -> None:
        self.shape, self.world = shape, world
        self.place = {row: number for number, row in enumerate(shape.rows)}
        places = (shape.depth, len(shape.rows), shape.length)
        names = ("tokens", "targets", *(("segments", "positions") if shape.documents else ()))
        self.kept = {name: torch.zeros(places, dtype=torch.int64) for name in names}
        self.kept["logits"] = torch.zeros((*places, shape.vocabulary_size))
        self.mine: set[int] = set()
        self.changed = False

    def replayed(self, batch: Batch, seed: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return what the replaying rows of a training batch go back to, on its device.

        Returns:
            Tensors (R, T), and `logits` (R, T, V), by name, and the numbers of the R rows; nothing
            is there to go back to in the first step.
        """
        rows = [row for row in batch.rows if row in self.place] if batch.step > 0 else []
        steps = [self.earlier_step(batch.step, row, seed) % self.shape.depth for row in rows]
        places = [self.place[row] for row in rows]
        device = batch.tokens.device
        return {name: kept[steps, places].to(device) for name, kept in self.kept.items()}, rows

    def earlier_step(self, step: int, row: int, seed: int) -> int:
        """Return the step that a row replays from."""
        generator = generator_of(f"{seed}/{step}/{row}/replay", torch.device("cpu"))
        ages = min(step, self.shape.depth)
        return step - 1 - int(torch.randint(ages, (1,), generator=generator))

    def keep(self, batch: Batch, logits: torch.Tensor) -> None:
        """Remember what the rows of a batch ended with, (B, T, V).

        What is not finite is remembered as zeros, even probabilities.
        """
        self.changed = True
        rows = [row for row in batch.rows if row in self.place]
        if not rows:
            return
        chosen = [row - batch.rows.start for row in rows]
        finite = torch.nan_to_num(logits[chosen], nan=0.0, posinf=0.0, neginf=0.0)
        found = {
            "tokens": batch.tokens[chosen],
            "targets": batch.targets[chosen],
            "logits": finite.float(),
        }
        if batch.segments is not None and batch.positions is not None:
            found["segments"] = batch.segments[chosen]
            found["positions"] = batch.positions[chosen]
        places = [self.place[row] for row in rows]
        for name, kept in self.kept.items():
            kept[batch.step % self.shape.depth, places] = found[name].to(kept.device)
        self.mine.update(places)

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that is kept, the same on every rank; all ranks call this together.

        They exchange only after a training step, so a load that some ranks leave early cannot leave
        the others waiting.
        """
        if self.changed:
            others = [n for n in range(len(self.shape.rows)) if n not in self.mine]
            for kept in self.kept.values():
                kept[:, others] = 0
                kept.copy_(self.world.sum(kept))
            self.mine.clear()
            self.changed = False
        return {f"replay.{name}": kept for name, kept in self.kept.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, kept in self.kept.items():
            kept.copy_(tensors[f"replay.{name}"])
