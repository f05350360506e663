"""Channel mixer `F`: the gated feed-forward block SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from interlace.kernels import swiglu
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.initial import matrix_value, residual_matrix_value
from interlace.trainer.models.layers import Linear
from interlace.trainer.models.registry import Flops, Role, SavedElements, Traits, channel_mixer
from interlace.trainer.models.shapes import ffn_width


@channel_mixer("F", "swiglu")
class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    traits: ClassVar[Traits] = Traits(decoding="nothing")

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        hidden = ffn_width(config)
        self.gate = Linear(config.width, hidden)
        self.up = Linear(config.width, hidden)
        self.down = Linear(hidden, config.width)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D), each position alone."""
        return self.down(swiglu(self.gate(x), self.up(x)))

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> None:
        """Nothing is remembered between positions."""
        return

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Normal; the down projection writes into the residual stream."""
        if name == "down.weight":
            return residual_matrix_value(shape, config, generator)
        return matrix_value(shape, generator)

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """Three matrices between widths."""
        return {"gate.weight": "hidden", "up.weight": "hidden", "down.weight": "residual"}

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Weights of the three projections."""
        return 3 * config.width * ffn_width(config)

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """Three products forward, six backward."""
        forward = 2 * cls.parameter_count(config)
        return Flops(forward, 2 * forward)

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """Results of gate and up, and their gated product."""
        hidden = ffn_width(config)
        return SavedElements(kept=3 * hidden, products=2 * hidden + config.width)

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """Nothing is remembered between positions."""
        return 0
