"""Sequence mixer `A`: grouped-query attention with rotary positions and optional query/key norm.

References: grouped queries, Ainslie et al. 2023 (arXiv 2305.13245); query/key norm, Henry et al.
2020 (arXiv 2010.04245); rotary positions, Su et al. 2021 (arXiv 2104.09864).
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from interlace.kernels import apply_rotary, attention
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext, KeyValueCache
from interlace.trainer.models.initial import matrix_value, residual_matrix_value
from interlace.trainer.models.layers import Linear, RMSNorm
from interlace.trainer.models.registry import Flops, Role, SavedElements, Traits, sequence_mixer
from interlace.trainer.models.shapes import head_width, kv_heads


@sequence_mixer("A", "attention")
class Attention(nn.Module):
    """Causal attention inside documents."""

    traits: ClassVar[Traits] = Traits(order=2, decoding="keys and values")

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.head_width = head_width(config)
        self.backend = config.attention_backend
        self.score_scale = 1.0 / math.sqrt(self.head_width)
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
        q, k, v = self.project(x, context.rotary)
        if context.cache is not None:
            assert isinstance(context.cache, KeyValueCache), (
                "attention decodes with keys and values"
            )
            k, v = context.cache.append(k, v)
        mixed = attention(
            q,
            k,
            v,
            scale=self.score_scale,
            segment_ids=context.segments,
            order=context.order,
            backend=self.backend,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def project(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (B, H, T, K), and keys and values (B, G, T, K), of (B, T, D), normed and
        turned.
        """
        heads = (-1, self.head_width)
        q, k = self.query(x).unflatten(-1, heads), self.key(x).unflatten(-1, heads)
        v = self.value(x).unflatten(-1, heads).transpose(1, 2)
        # Norms come before the transposition: the layout (B, T, H, K) then lasts through attention,
        # and its result needs no copy.
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> KeyValueCache:
        """Return an empty cache for `length` positions, on the device and in the dtype of
        `like`.
        """
        heads = self.key.weight.shape[0] // self.head_width
        shape = (batch, heads, length, self.head_width)
        return KeyValueCache(like.new_empty(shape), like.new_empty(shape))

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Gains are one, matrices normal; the output projection writes into the residual stream."""
        if name in {"query_norm.weight", "key_norm.weight"}:
            return torch.ones(shape)
        if name == "output.weight":
            return residual_matrix_value(shape, config, generator)
        return matrix_value(shape, generator)

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """Four matrices between widths; the norms' gains."""
        roles: dict[str, Role] = {f"{name}.weight": "hidden" for name in ("query", "key", "value")}
        roles["output.weight"] = "residual"
        if config.query_key_norm:
            roles |= {"query_norm.weight": "vector", "key_norm.weight": "vector"}
        return roles

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Weights of the four projections and the norms."""
        width = head_width(config)
        projections = 2 * config.width * width * (config.heads + kv_heads(config))
        return projections + (2 * width if config.query_key_norm else 0)

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """Projections, and scores and mixing over all T positions.

        Counted as `torch.utils.flop_counter` counts the fused kernels: the causal half is not
        discounted, and backward has five products of the size of the scores, since the kernels
        compute the scores again.
        """
        width = head_width(config)
        projections = 4 * config.width * width * (config.heads + kv_heads(config))
        product = 2 * sequence_length * width * config.heads
        return Flops(projections + 2 * product, 2 * projections + 5 * product)

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """Turned q and k, v, attention's result and log-sum-exp, and the mask of documents where
        the back end is handed the whole of it; so it is with `auto`, which a plan has resolved.

        Query/key norms keep their input, the normalised values and the inverse roots in fp32.
        """
        wide = config.heads * head_width(config)
        narrow = kv_heads(config) * head_width(config)
        whole_mask = config.attention_backend in {"auto", "sdpa", "reference"}
        mask = sequence_length if whole_mask else 0
        norms = 0
        if config.query_key_norm:
            norms = 2 * (wide + narrow) + config.heads + kv_heads(config)
        return SavedElements(
            kept=2 * wide + 2 * narrow + mask,
            products=2 * wide + 2 * narrow + config.width,
            kept_wide=norms + config.heads,
            products_wide=config.heads,
        )

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """Keys and values of every position."""
        return 2 * kv_heads(config) * head_width(config) * length * element_bytes
