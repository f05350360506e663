"""The mixer on the bench: built as training builds it, fed with random rows.

Every tensor is drawn from a generator of its own, so two runs measure the same. Parameters start
from the mixer's own initial values and are moved a little: a gain of one or an output matrix of
zeros would hide what it multiplies.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext, LayerCache, Routed
from interlace.trainer.models.language_model import rotary_in
from interlace.trainer.models.registry import (
    SEQUENCE_LETTERS,
    Mixer,
    mixer_class,
    registered_letters,
)
from interlace.trainer.parallel import cast_weights

LENGTH = 71
"""Positions of a row: odd, and more than one chunk of the scans."""

NUDGE = 0.02
"""Deviation of what is added to every parameter."""


@dataclass(frozen=True)
class Subject:
    """A registered mixer and the shape it is tried at.

    Attributes:
        letter: Its letter.
        config: The `[model]` table; the pattern is the letter.
    """

    letter: str
    config: ModelSection

    @property
    def kind(self) -> type[Mixer]:
        """The class."""
        return mixer_class(self.letter)

    @property
    def name(self) -> str:
        """What the letter stands for."""
        return registered_letters()[self.letter]

    @property
    def mixes_positions(self) -> bool:
        """Whether it is registered as a sequence mixer."""
        return self.letter in SEQUENCE_LETTERS

    def empty(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module without values, built under the meta device as training does it."""
        with torch.device("meta"):
            module = cast(nn.Module, self.kind(self.config))
            if dtype is torch.float64:
                module.double()
            else:
                cast_weights(module, dtype)
        return module.to_empty(device="cpu")

    @torch.no_grad()
    def module(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Return the module with values, the same for the same seed."""
        module = self.empty(dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            shape = tuple(tensor.shape)
            value = self.kind.initial_value(name, shape, self.config, generator)
            if isinstance(tensor, nn.Parameter):
                value = value + NUDGE * torch.randn(shape, generator=generator)
            tensor.copy_(value)
        return module

    def rows(
        self, rows: int, length: int = LENGTH, dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> torch.Tensor:
        """Return random input (rows, length, D), of unit variance as a norm leaves it."""
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, length, self.config.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def context(
        self,
        x: torch.Tensor,
        *,
        start: int = 0,
        segments: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        order: int = 1,
    ) -> BlockContext:
        """Return what a block that is given `x` sees beside it.

        Args:
            x: (B, T, D).
            start: Position of the first of `x`, where they are counted on.
            segments: (B, T) document numbers, or None.
            positions: (B, T) positions inside documents; counted from `start` by default.
            cache: Decoding state, or None.
            order: How often the result will be differentiated.
        """
        if positions is None:
            positions = torch.arange(start, start + x.shape[1])[None]
        rotary = rotary_in(x.dtype, positions, self.config)
        return BlockContext(rotary, segments, cache, order)


def output_of(mixed: torch.Tensor | Routed) -> torch.Tensor:
    """Return the output alone of what a mixer returns."""
    return mixed.output if isinstance(mixed, Routed) else mixed


def forward(module: nn.Module, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
    """Return the mixer's output (B, T, D)."""
    return output_of(module(x, context))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest expected value; infinite for what is
    not finite.
    """
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = float(expected.abs().max().clamp_min(1e-30))
    return float((found - expected).abs().max()) / scale
