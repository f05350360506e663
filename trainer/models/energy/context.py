"""The stream of observed tokens: an ordinary causal stack whose keys and values are recorded.

Nothing of it depends on a candidate, so it runs once for all steps of descent. Only keys and values
are read from it, so it ends at those of the last attention block.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from interlace.trainer.models.context import BlockContext, KeyValueCache, LayerCache
from interlace.trainer.models.language_model import Block, Layer
from interlace.trainer.models.mixers.attention import Attention


class Observed(NamedTuple):
    """What candidates see of the observed positions in one attention block.

    Attributes:
        keys: (B, G, S, K), normed and turned.
        values: (B, G, S, K).
    """

    keys: torch.Tensor
    values: torch.Tensor


class Recorder(KeyValueCache):
    """A cache that remembers what a block appends as it is, with its graph."""

    def __init__(self) -> None:
        nothing = torch.empty(0)
        super().__init__(nothing, nothing)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note keys and values (B, G, T, K) and return them."""
        self.keys, self.values, self.length = k, v, k.shape[2]
        return k, v


def last_attention(patterns: Sequence[str]) -> tuple[int, int]:
    """Return layer and block of the last attention block."""
    layer = max(number for number, letters in enumerate(patterns) if "A" in letters)
    return layer, patterns[layer].rindex("A")


def context_layer(
    layer: Layer,
    context: BlockContext,
    caches: Sequence[LayerCache | None] | None,
    stop: int | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Run one layer over the observed tokens.

    Args:
        layer: Its blocks.
        context: Rotary tables of the positions, and segments.
        caches: Decoding state per block, which is advanced, or None outside decoding.
        stop: The attention block that nobody reads more of than keys and values, or None.
        x: (B, T, D).

    Returns:
        What goes into the next layer, (B, T, D), and keys and values of all attention blocks in
        turn, (B, G, S, K) each.
    """
    found: list[torch.Tensor] = []
    for number, block in enumerate(cast(Sequence[Block], layer.blocks)):
        if not isinstance(block.mixer, Attention):
            x, _ = block(x, context)
            continue
        cache = Recorder() if caches is None else cast(KeyValueCache, caches[number])
        if number == stop:
            _, k, v = block.mixer.project(block.norm(x), context.rotary)
            return x, *found, *cache.append(k, v)
        x, _ = block(x, replace(context, cache=cache))
        found += [cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]]
    return x, *found
