"""The language model: embedding, a stack of pre-norm residual blocks spelled by a pattern, norm,
head.

A `Layer` is one word of the pattern; it is the unit of sharding, recomputation and compilation.
Parameters may be wider than the compute dtype: they are cast where they are used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

from interlace.kernels import linear_cross_entropy, rotary_tables
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext, LayerCache, Routed
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.layers import Embedding, Linear, RMSNorm
from interlace.trainer.models.model import Balances, Caches, Model
from interlace.trainer.models.registry import mixer_class
from interlace.trainer.models.shapes import head_width


class Routing(NamedTuple):
    """What one block with experts reports: its share of the objective, and choices per expert."""

    loss: torch.Tensor
    load: torch.Tensor


class LanguageLoss(NamedTuple):
    """Losses of one pass.

    Attributes:
        objective: What is differentiated: likelihood, z-loss and balance losses, a scalar.
        mean_nll: Mean negative log-likelihood, nats per token.
        expert_loads: Choices per expert, (E,) int64, for each block with experts from the first.
        details: Parts of the objective by name, for the log, without a graph.
    """

    objective: torch.Tensor
    mean_nll: torch.Tensor
    expert_loads: list[torch.Tensor]
    details: Mapping[str, torch.Tensor] = MappingProxyType({})


class Block(nn.Module):
    """`x + multiplier * mixer(norm(x))`.

    Attributes:
        multiplier: 1, unless muP follows the depth.
    """

    def __init__(self, letter: str, config: ModelSection) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mixer = mixer_class(letter)(config)
        self.multiplier = 1.0

    def forward(self, x: torch.Tensor, context: BlockContext) -> tuple[torch.Tensor, Routed | None]:
        """Map (B, T, D) to (B, T, D); also return what a block with experts reports."""
        mixed = self.mixer.forward(self.norm(x), context)
        if isinstance(mixed, Routed):
            return x + self.scaled(mixed.output), mixed
        return x + self.scaled(mixed), None

    def scaled(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return what the mixer adds to the residual stream."""
        return mixed if self.multiplier == 1.0 else mixed * self.multiplier


class Layer(nn.Module):
    """One word of the pattern."""

    def __init__(self, letters: str, config: ModelSection) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(letter, config) for letter in letters)

    def forward(
        self,
        x: torch.Tensor,
        context: BlockContext,
        caches: Sequence[LayerCache | None] | None = None,
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Map (B, T, D) to (B, T, D); `caches` holds one decoding state per block.

        Returns:
            The result, and loss and load of every block with experts: results of the layer, so that
            sharding and recomputation see them.
        """
        routings: list[Routing] = []
        for number, block in enumerate(self.blocks):
            seen = context if caches is None else replace(context, cache=caches[number])
            x, routed = block(x, seen)
            if routed is not None:
                routings.append(Routing(routed.loss, routed.load))
        return x, routings

    def new_caches(self, batch: int, length: int, like: torch.Tensor) -> list[LayerCache | None]:
        """Return one empty decoding state per block, in the dtype and on the device of `like`."""
        return [cast(Block, block).mixer.new_cache(batch, length, like) for block in self.blocks]


class LanguageModel(Model):
    """Next-token model over a vocabulary."""

    def __init__(
        self, config: ModelSection, vocabulary_size: int, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = Embedding(vocabulary_size, config.width)
        self.layers = nn.ModuleList(Layer(letters, config) for letters in layer_patterns(config))
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
    ) -> LanguageLoss:
        """Return the mean loss of predicting `targets`.

        The loss is computed in here, so that a sharded head is whole where it is needed.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each.
            segments: (B, T) document numbers that attention does not cross, or None.
            positions: (B, T) positions inside the documents; counted from 0 by default.
            z_loss: Weight of the z-loss.
        """
        hidden, routings = self.hidden(tokens, segments, positions)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight(), targets.flatten(), z_loss=z_loss
        )
        objective = loss.objective
        for routing in routings:
            objective = objective + routing.loss
        return LanguageLoss(objective, loss.mean_nll, [routing.load for routing in routings])

    def logits(
        self,
        tokens: torch.Tensor,
        caches: Caches | None = None,
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
        hidden, _ = self.hidden(tokens, None, positions, caches)
        hidden = hidden[:, -1:] if last_only else hidden
        return functional.linear(hidden, self.head_weight().to(hidden.dtype)).float()

    def hidden(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        positions: torch.Tensor | None,
        caches: Caches | None = None,
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Return the normed output of the stack, (B, T, D) in the compute dtype, and what blocks
        with experts report.
        """
        x, context = self.entrance(tokens, segments, positions)
        routings: list[Routing] = []
        for number, layer in enumerate(self.layers):
            x, found = layer(x, context) if caches is None else layer(x, context, caches[number])
            routings += found
        return self.norm(x), routings

    def entrance(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, BlockContext]:
        """Return the embedded tokens, (B, T, D) in the compute dtype, and what all blocks share."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        context = BlockContext(
            rotary=rotary_in(self.compute_dtype, positions, self.config), segments=segments
        )
        x = functional.embedding(tokens, self.embedding.weight).to(self.compute_dtype)
        return x, context

    @property
    def units(self) -> list[nn.Module]:
        """The layers: what is sharded, recomputed and compiled one by one."""
        return list(self.layers)

    def balance_experts(self, loads: Sequence[torch.Tensor]) -> None:
        """Let every block with experts answer to the choices, (E,), of a whole step."""
        blocks = [
            block.mixer
            for layer in self.layers
            for block in cast(Layer, layer).blocks
            if isinstance(block.mixer, Balances)
        ]
        for mixer, load in zip(blocks, loads, strict=True):
            mixer.balance(load)

    def head_weight(self) -> torch.Tensor:
        """Return the output matrix (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_caches(self, batch: int, length: int) -> Caches:
        """Return empty decoding state for `length` positions: one entry per layer and block."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        return [cast(Layer, layer).new_caches(batch, length, like) for layer in self.layers]


def rotary_in(
    dtype: torch.dtype, positions: torch.Tensor, config: ModelSection
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the tables of rotary embedding for positions (B or 1, T), or None for NoPE."""
    if config.positions == "none":
        return None
    cosine, sine = rotary_tables(positions, head_width(config), config.rope_base)
    # Cast once: a cast at use would leave a copy in every layer for the backward pass.
    return cosine.to(dtype), sine.to(dtype)
