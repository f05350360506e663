"""Diagnostic `clip_fraction`: what share of its coordinates clipping cut, of the model and of every
tensor.

On by itself where coordinates are clipped (Pan and Li 2023, arXiv 2306.00204). The threshold is
right where a fifth or so is cut: near 0 the rule is plain gradient descent, near 1 that of signs.
The kernels count while they update, so the numbers cost nothing; they are of the newest update that
is finished, which is that of the step before.
"""

from collections.abc import Mapping

import torch

from interlace.offload.clipping import mean_fraction
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import diagnostic
from interlace.trainer.engines.fsdp2 import own_optimizer


@diagnostic("clip_fraction")
class ClipFraction:
    """One number for the model in the record, one for every tensor in TensorBoard."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        self.state = state
        named = state.model.named_parameters()
        self.names: dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
        self.newest: dict[str, float] = {}

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return `clip_fraction`; nothing before the first update is finished."""
        optimizer = own_optimizer(self.state.engine)
        # Takes in what no hook has taken: with the first gradient the last step is finished.
        optimizer.gradient_norm()
        fractions = optimizer.clip_fractions()
        self.newest = {f"clip_fraction.{self.names[p]}": each for p, each in fractions.items()}
        return {"clip_fraction": mean_fraction(fractions)} if fractions else {}

    def of_tensors(self) -> Mapping[str, float]:
        """Return `clip_fraction.NAME` for every tensor that was updated."""
        return self.newest
