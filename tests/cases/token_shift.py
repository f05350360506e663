"""Sequence mixer `S`: token shift, as in RWKV (Peng et al. 2023, arXiv 2305.13048, section 3.1).

Every position sees a blend of itself and the one before it, a share per channel, and a matrix
mixes the channels. Nothing comes from before a document's first position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.initial import residual_matrix_value
from interlace.trainer.models.layers import Linear
from interlace.trainer.models.registry import Flops, Role, SavedElements, Traits, sequence_mixer


@dataclass
class LastInput:
    """What decoding remembers: the newest input (B, 1, D), after `length` positions."""

    value: torch.Tensor
    length: int = 0


@sequence_mixer("S", "token_shift")
class TokenShift(nn.Module):
    """`output(previous + share * (x - previous))`."""

    traits: ClassVar[Traits] = Traits(decoding="state")

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(config.width))
        self.output = Linear(config.width, config.width)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        previous = self.previous(x, context)
        return self.output(previous + self.share.to(x.dtype) * (x - previous))

    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Return the input one position earlier (B, T, D), zeros where there is none."""
        cache = context.cache
        if isinstance(cache, LastInput):
            before = torch.cat([cache.value, x[:, :-1]], 1)
            cache.value, cache.length = x[:, -1:].clone(), cache.length + x.shape[1]
            return before
        before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        if context.segments is None:
            return before
        begins = context.segments.diff(dim=1, prepend=context.segments[:, :1]) != 0
        return before.masked_fill(begins[..., None], 0.0)

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> LastInput:
        """Return the state before the first position."""
        return LastInput(like.new_zeros(batch, 1, self.share.numel()))

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Half of each position; the matrix writes into the residual stream."""
        if name == "share":
            return torch.full(shape, 0.5)
        return residual_matrix_value(shape, config, generator)

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """A share per channel, and a matrix that writes into the residual stream."""
        return {"share": "vector", "output.weight": "residual"}

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Shares and matrix."""
        return config.width + config.width**2

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """One matrix product forward, two backward."""
        return Flops(2 * config.width**2, 4 * config.width**2)

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """The difference, which the shares' gradient needs, and the matrix's input."""
        return SavedElements(kept=2 * config.width, products=config.width)

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """One input, whatever the length."""
        return config.width * element_bytes
