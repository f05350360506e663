"""Sequence mixer `A`: grouped-query attention with rotary positions and optional query/key norm.

References: grouped queries, Ainslie et al. 2023 (arXiv 2305.13245); query/key norm, Henry et al.
2020 (arXiv 2010.04245); rotary positions, Su et al. 2021 (arXiv 2104.09864).
"""

import torch
from torch import nn

from interlace.kernels import apply_rotary, attention
from interlace.trainer.config.schema import ModelSection
from interlace.trainer.models.context import BlockContext, KeyValueCache
from interlace.trainer.models.layers import Linear, RMSNorm
from interlace.trainer.models.registry import Flops, SavedElements, sequence_mixer
from interlace.trainer.models.shapes import head_width, kv_heads


@sequence_mixer("A", "attention")
class Attention(nn.Module):
    """Causal attention inside documents."""

    residual_output = "output"

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.head_width = head_width(config)
        wide, narrow = config.heads * self.head_width, kv_heads(config) * self.head_width
        self.query = Linear(config.width, wide)
        self.key = Linear(config.width, narrow)
        self.value = Linear(config.width, narrow)
        self.output = Linear(wide, config.width)
        normed = config.query_key_norm
        self.query_norm = RMSNorm(self.head_width, config.norm_epsilon) if normed else None
        self.key_norm = RMSNorm(self.head_width, config.norm_epsilon) if normed else None

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D); with a cache, attend to its positions too."""
        q, k, v = (self.split_heads(x_) for x_ in (self.query(x), self.key(x), self.value(x)))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = apply_rotary(q, *context.rotary), apply_rotary(k, *context.rotary)
        if context.cache is not None:
            assert isinstance(context.cache, KeyValueCache), (
                "attention decodes with keys and values"
            )
            k, v = context.cache.append(k, v)
        mixed = attention(q, k, v, segments=context.segments)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Turn (B, T, H * K) into (B, H, T, K)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> KeyValueCache:
        """Return an empty cache for `length` positions, on the device and in the dtype of
        `like`.
        """
        heads = self.key.weight.shape[0] // self.head_width
        shape = (batch, heads, length, self.head_width)
        return KeyValueCache(like.new_empty(shape), like.new_empty(shape))

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Weights of the four projections and the norms."""
        width = head_width(config)
        projections = 2 * config.width * width * (config.heads + kv_heads(config))
        return projections + (2 * width if config.query_key_norm else 0)

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """Projections, and scores and mixing over all T positions (the mask is not discounted).

        Backward costs twice the projections, and five products of the size of scores, since fused
        kernels compute the scores again.
        """
        width = head_width(config)
        projections = 4 * config.width * width * (config.heads + kv_heads(config))
        product = 2 * sequence_length * width * config.heads
        return Flops(projections + 2 * product, 2 * projections + 5 * product)

    @classmethod
    def saved_elements(cls, config: ModelSection) -> SavedElements:
        """Input, q, k, v before and after rotation, attention's result and its log-sum-exp."""
        wide = config.heads * head_width(config)
        narrow = kv_heads(config) * head_width(config)
        normed = wide + narrow if config.query_key_norm else 0
        wide_norm = config.heads + kv_heads(config) if config.query_key_norm else 0
        return SavedElements(
            expensive=wide + narrow + wide,
            cheap=wide + narrow + normed,
            wide=config.heads + wide_norm,
        )
