"""The language model: embedding, a stack of pre-norm residual blocks spelled by a pattern, norm,
head.

A `Layer` is one repetition of the pattern; it is the unit of sharding, recomputation and
compilation. Parameters may be wider than the compute dtype: they are cast where they are used.
Initial values depend on the seed and the parameter's name only, so every number of ranks starts
from the same weights.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional

from interlace.kernels import HeadLoss, linear_cross_entropy, rotary_tables
from interlace.trainer.config.schema import ModelSection
from interlace.trainer.models.context import BlockContext, LayerCache
from interlace.trainer.models.initial import embedding_value
from interlace.trainer.models.layers import Linear, RMSNorm
from interlace.trainer.models.registry import mixer_class
from interlace.trainer.models.shapes import head_width

MIXER_PARAMETER = re.compile(r"layers\.\d+\.blocks\.(?P<block>\d+)\.mixer\.(?P<rest>.+)")


class Block(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, letter: str, config: ModelSection) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mixer = mixer_class(letter)(config)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return x + self.mixer.forward(self.norm(x), context)


class Layer(nn.Module):
    """One repetition of the pattern."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(letter, config) for letter in config.pattern)

    def forward(
        self,
        x: torch.Tensor,
        context: BlockContext,
        caches: Sequence[LayerCache | None] | None = None,
    ) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D); `caches` holds one decoding state per block."""
        for number, block in enumerate(self.blocks):
            x = block(x, context if caches is None else replace(context, cache=caches[number]))
        return x

    def new_caches(self, batch: int, length: int, like: torch.Tensor) -> list[LayerCache | None]:
        """Return one empty decoding state per block, in the dtype and on the device of `like`."""
        return [cast(Block, block).mixer.new_cache(batch, length, like) for block in self.blocks]


class LanguageModel(nn.Module):
    """Next-token model over a vocabulary."""

    def __init__(
        self, config: ModelSection, vocabulary_size: int, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Embedding(vocabulary_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tie_embeddings else Linear(config.width, vocabulary_size)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        segments: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        z_loss: float = 0.0,
    ) -> HeadLoss:
        """Return the mean loss of predicting `targets`.

        The loss is computed in here, so that a sharded head is whole where it is needed.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each.
            segments: (B, T) document numbers that attention does not cross, or None.
            positions: (B, T) positions inside the documents; counted from 0 by default.
            z_loss: Weight of the z-loss.
        """
        hidden = self.hidden(tokens, segments, positions)
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight(), targets.flatten(), z_loss=z_loss
        )

    def logits(
        self,
        tokens: torch.Tensor,
        caches: Sequence[Sequence[LayerCache | None]] | None = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Return fp32 logits of one document per row.

        Args:
            tokens: (B, T) int64; with caches, the tokens that follow those in the caches.
            caches: Decoding state from `new_caches`, which is advanced.
            last_only: Compute the last position's logits only.

        Returns:
            (B, T, V), or (B, 1, V) for the last position.
        """
        positions = None
        if caches is not None:
            start = next((c.length for layer in caches for c in layer if c is not None), 0)
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        hidden = self.hidden(tokens, None, positions, caches)
        hidden = hidden[:, -1:] if last_only else hidden
        return functional.linear(hidden, self.head_weight().to(hidden.dtype)).float()

    def hidden(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        positions: torch.Tensor | None,
        caches: Sequence[Sequence[LayerCache | None]] | None = None,
    ) -> torch.Tensor:
        """Return the normed output of the stack, (B, T, D) in the compute dtype."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cosine, sine = rotary_tables(positions, head_width(self.config), self.config.rope_base)
        # Cast once: a cast at use would leave a copy in every layer for the backward pass.
        rotary = cosine.to(self.compute_dtype), sine.to(self.compute_dtype)
        context = BlockContext(rotary=rotary, segments=segments)
        x = functional.embedding(tokens, self.embedding.weight).to(self.compute_dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, context) if caches is None else layer(x, context, caches[number])
        return self.norm(x)

    def head_weight(self) -> torch.Tensor:
        """Return the output matrix (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_caches(self, batch: int, length: int) -> list[list[LayerCache | None]]:
        """Return empty decoding state for `length` positions: one entry per layer and block."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        return [cast(Layer, layer).new_caches(batch, length, like) for layer in self.layers]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all parameters, also sharded ones, with their initial values for `seed`."""
        for name, parameter in self.named_parameters():
            fill(parameter, initial_value(name, tuple(parameter.shape), seed, self.config))


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, config: ModelSection
) -> torch.Tensor:
    """Return the whole initial value of one parameter, fp32 on the CPU.

    It is a function of the seed, the parameter's name and its shape only. Norm gains are 1,
    embedding and head normal with deviation 0.02; mixers say how their own parameters start.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    inside = MIXER_PARAMETER.fullmatch(name)
    if inside is not None:
        letter = config.pattern[int(inside["block"])]
        return mixer_class(letter).initial_value(inside["rest"], shape, config, generator)
    if name in {"embedding.weight", "head.weight"}:
        return embedding_value(shape, generator)
    return torch.ones(shape)


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy this rank's part of a whole value into a plain or sharded parameter."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))
    parameter.to_local().copy_(value[index])
