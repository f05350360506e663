"""Diagnostic `gradient_norms`: the gradient's norm in every block, before clipping.

The optimizer has the sum of squares of each gradient already, for the global norm; here the same
numbers are added up by block, and over the ranks in one reduction. Where a tensor is replicated
each copy counts for its share only.
"""

import math
import re
from collections.abc import Mapping

import torch

from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import diagnostic

BLOCK = re.compile(r"(.*\.)?(layers\.\d+\.blocks\.\d+)\..+")


@diagnostic("gradient_norms")
class GradientNorms:
    """One number per block, and one for each other part of the model."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        self.state = state
        parameters = dict(state.model.named_parameters())
        self.parts = {id(value): part_of(name) for name, value in parameters.items()}
        self.names = list(dict.fromkeys(self.parts.values()))

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return `gradient_norm.PART` for every part; not finite where its gradient is not."""
        engine, world = self.state.engine, self.state.world
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        for parameter, square in engine.squares():
            place = self.names.index(self.parts[id(parameter)])
            sums[place] += square / engine.copies_of(parameter)
        total = world.sum(sums).tolist()
        pairs = zip(self.names, total, strict=True)
        return {f"gradient_norm.{name}": root(value) for name, value in pairs}


def part_of(name: str) -> str:
    """Return the part of a model that a parameter is in: its block, or its outermost module."""
    inside = BLOCK.fullmatch(name)
    return inside[2] if inside else name.split(".")[0]


def root(square: float) -> float:
    """Return a square root; NaN of what has none."""
    return math.sqrt(square) if square >= 0.0 else math.nan
