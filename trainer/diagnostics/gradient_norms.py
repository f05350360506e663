"""Diagnostic `gradient_norms`: the gradient's norm in every block, before clipping.

The optimizer has the sum of squares of each gradient already, for the global norm; here the same
numbers are added up by block, and over the ranks in one reduction. Where a tensor is replicated
each copy counts for its share only.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, Replicate

from interlace.offload.gradients import squares_of
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
        optimizer, world = self.state.optimizer, self.state.world
        # Takes in what no hook has taken; the norm itself is known and costs nothing.
        optimizer.gradient_norm()
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        for member, square in squares_of(optimizer.subgroups):
            place = self.names.index(self.parts[id(member.parameter)])
            sums[place] += float(square) / copies_of(member.parameter, world.size)
        total = world.sum(sums).tolist()
        pairs = zip(self.names, total, strict=True)
        return {f"gradient_norm.{name}": root(value) for name, value in pairs}


def part_of(name: str) -> str:
    """Return the part of a model that a parameter is in: its block, or its outermost module."""
    inside = BLOCK.fullmatch(name)
    return inside[2] if inside else name.split(".")[0]


def copies_of(parameter: torch.Tensor, ranks: int) -> int:
    """Return how many ranks hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return ranks
    mesh = parameter.device_mesh
    same = [
        mesh.size(dimension)
        for dimension, placement in enumerate(parameter.placements)
        if isinstance(placement, Replicate)
    ]
    return math.prod(same)


def root(square: float) -> float:
    """Return a square root; NaN of what has none."""
    return math.sqrt(square) if square >= 0.0 else math.nan
