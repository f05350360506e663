"""The stream of candidates: one guess per position, each before the same observed past.

Candidate `t` guesses token `t + 1` from the rotary position of that token. It attends to observed
positions 0 to t of its document and to itself, never to another candidate: so the sum of all
energies has every candidate's own gradient in it. Attention to the observed positions is the fused
one; the candidate's own score joins by the log-sum-exp,

    share = sigmoid(own score - lse),  out = (1 - share) * observed + share * own value

which is the softmax over both, without a copy of anything.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from interlace.kernels import attention
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.energy.context import Observed
from interlace.trainer.models.language_model import Block, Layer
from interlace.trainer.models.mixers.attention import Attention

Stage = Callable[[torch.Tensor], torch.Tensor]
"""A part of the way from candidates to energies."""


@dataclass(frozen=True)
class Standpoint:
    """Where candidates are.

    Attributes:
        rotary: Tables of their positions in the compute dtype, or None (NoPE).
        segments: Document of every observed position, (B, S); the last T are the candidates', or
            None if there are no boundaries.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    segments: torch.Tensor | None


class Modulation(NamedTuple):
    """What adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748, section 3.2) does to a block, (D,)
    each: `x + gate * mixer(norm(x) * (1 + scale) + shift)`.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


def attend(
    mixer: Attention, x: torch.Tensor, observed: Observed, place: Standpoint, order: int
) -> torch.Tensor:
    """Return attention of candidates (B, T, D) to observed positions and themselves, (B, T, D)."""
    q, k, v = mixer.project(x, place.rotary)
    seen, lse = attention(
        q,
        *observed,
        scale=mixer.score_scale,
        segment_ids=place.segments,
        return_lse=True,
        order=order,
        backend=mixer.backend,
    )
    # Query heads by the key head that serves them, (B, G, H / G, T, K).
    grouped, alone = q.unflatten(1, (k.shape[1], -1)).to(lse.dtype), k.unsqueeze(2).to(lse.dtype)
    score = (grouped * alone).sum(-1).flatten(1, 2) * mixer.score_scale
    share = torch.sigmoid(score - lse).unsqueeze(-1)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    mixed = (seen + share * (values - seen)).to(q.dtype)
    return mixer.output(mixed.transpose(1, 2).flatten(2))


def candidate_layer(
    layer: Layer,
    observed: Sequence[Observed],
    modulations: Sequence[Modulation | None],
    place: Standpoint,
    order: int,
    x: torch.Tensor,
) -> torch.Tensor:
    """Run one layer over candidates.

    Args:
        layer: Its blocks.
        observed: Keys and values of each of its attention blocks.
        modulations: One for each block, or None.
        place: Where the candidates are.
        order: How often attention will be differentiated.
        x: (B, T, D).
    """
    seen, nothing = iter(observed), BlockContext(rotary=None, segments=None)
    for block, modulation in zip(cast(Sequence[Block], layer.blocks), modulations, strict=True):
        normed = block.norm(x)
        if modulation is not None:
            normed = normed * (1 + modulation.scale) + modulation.shift
        if isinstance(block.mixer, Attention):
            mixed = attend(block.mixer, normed, next(seen), place, order)
        else:
            mixed = cast(torch.Tensor, block.mixer.forward(normed, nothing))
        mixed = block.scaled(mixed)
        x = x + (mixed if modulation is None else modulation.gate * mixed)
    return x


def by_block(tensors: Sequence[torch.Tensor]) -> Iterator[Observed]:
    """Yield keys and values that lie in turn in a flat sequence."""
    for k, v in zip(tensors[::2], tensors[1::2], strict=True):
        yield Observed(k, v)
