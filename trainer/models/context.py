"""What every block of a forward pass shares, what decoding remembers between passes, and what a
block that routes tokens reports.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class LayerCache(Protocol):
    """Decoding state of one mixer; `length` positions are in it."""

    length: int


class Routed(NamedTuple):
    """What a mixer that sends tokens to experts returns.

    Attributes:
        output: (B, T, D).
        loss: What the training adds to its objective, a scalar; already weighted.
        load: How many choices fell on each expert in this pass, (E,) int64.
    """

    output: torch.Tensor
    loss: torch.Tensor
    load: torch.Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far.

    Attributes:
        keys: (B, G, L, K), L the room.
        values: (B, G, L, K).
        length: Positions that are filled.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values (B, G, T, K) of new positions; return those of all positions.

        Raises:
            ValueError: There is no room for them.
        """
        end, room = self.length + k.shape[2], self.keys.shape[2]
        if end > room:
            raise ValueError(
                f"the cache has room for {room} positions and holds {self.length}; "
                f"{k.shape[2]} more do not fit"
            )
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class MambaCache:
    """What Mamba-2 carries from the positions seen so far: the same size whatever their number.

    Attributes:
        inputs: (B, W - 1, C), the last inputs of the convolution, oldest first; zeros at first.
        state: (B, H, P, N), fp32 (fp64 for fp64), the state of the recurrence; zeros at first.
        length: Positions that are in it.
    """

    inputs: torch.Tensor
    state: torch.Tensor
    length: int = 0


@dataclass(frozen=True)
class BlockContext:
    """Computed once per forward pass and read by all blocks.

    Attributes:
        rotary: Cosine and sine tables in the compute dtype, each (B or 1, 1, T, K), or None where
            positions are not told (NoPE).
        segments: Document number of each position, (B, T), or None if there are no boundaries.
        cache: Decoding state of the block that is called, or None outside decoding.
        order: How often the result will be differentiated; kernels that cannot are left out.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    segments: torch.Tensor | None
    cache: LayerCache | None = None
    order: int = 1
