"""Micro-batches as tensors: which rows this rank passes through the model, and their documents.

Row `i` of step `s` is the same for every number of ranks; pass `p` of rank `r` takes the rows
`(p * ranks + r) * m` to `+ m`. Nothing is remembered between steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from interlace.trainer.data.rows import TrainingRows, ValidationRows, positions_of, segments_of
from interlace.trainer.plan import Plan
from interlace.trainer.world import World


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the rank's device; B rows of T tokens.

    Attributes:
        tokens: Inputs, (B, T) int64.
        targets: The tokens that follow them, (B, T) int64.
        segments: Number of the document of each token, (B, T), or None if documents are ignored.
        positions: Position of each token in its document, (B, T), or None likewise.
        step: The training step it belongs to, from 0; -1 in a validation.
        rows: Numbers of its rows within the step or the validation, which do not depend on the
            number of ranks: with the seed and the step they fix what is drawn at random for a row.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None
    positions: torch.Tensor | None
    step: int
    rows: range


@dataclass(frozen=True)
class StepBatches:
    """Cuts every step, and every validation, into this rank's micro-batches."""

    training: TrainingRows
    validation: ValidationRows
    plan: Plan
    world: World
    end_of_text: int
    respect_documents: bool
    validation_bytes_per_token: float

    def of_step(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of one step, `accumulation` of them."""
        for rows in self.rows_of_step(step):
            yield self.to_batch(self.training.batch(step, rows), step, rows)

    def is_last(self, batch: Batch) -> bool:
        """Whether a micro-batch of a step is the last of this rank's."""
        size, ranks = self.plan.microbatch_rows, self.world.size
        return batch.rows.start // (size * ranks) == self.plan.accumulation - 1

    def rows_of_step(self, step: int) -> Iterator[range]:
        """Yield the row numbers of each of this rank's passes."""
        size = self.plan.microbatch_rows
        for number in range(self.plan.accumulation):
            first = (number * self.world.size + self.world.rank) * size
            yield range(first, first + size)

    def of_validation(self) -> Iterator[tuple[Batch, int]]:
        """Yield micro-batches of held-out rows and how many of their rows count.

        Every rank yields equally many, since a sharded forward pass needs all ranks; where rows run
        out, the first row stands in and does not count.
        """
        size, count = self.plan.microbatch_rows, self.validation.count
        stride = size * self.world.size
        for start in range(self.world.rank * size, -(-count // stride) * stride, stride):
            stop = min(start + size, count)
            counted = max(0, stop - start)
            rows = self.validation.batch(start, stop) if counted else self.validation.batch(0, 1)
            yield self.to_batch(rows, -1, range(start, start + len(rows))), counted

    def to_batch(self, rows: NDArray[np.int64], step: int, numbers: range) -> Batch:
        """Turn rows of T + 1 tokens into inputs, targets and document structure on the device."""
        tokens, targets = rows[:, :-1], rows[:, 1:]
        segments = positions = None
        if self.respect_documents:
            documents = segments_of(tokens, self.end_of_text)
            segments = self.on_device(documents)
            positions = self.on_device(positions_of(documents))
        inputs, wanted = self.on_device(tokens), self.on_device(targets)
        return Batch(inputs, wanted, segments, positions, step, numbers)

    def on_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        """Copy an array to the rank's device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.world.device.type == "cuda":
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor
