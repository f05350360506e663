"""How products of queries and keys become attention logits, and which pairs are seen at all.

Causal order, windows and packed documents are one thing here: every query sees a range of keys, cut
further by equality of segments and by a block-sparse mask. The ranges follow from `left` and
`right`, the keys a query sees before and after the one it is aligned with, or, where that is not
enough, are stored per query in `first` and `last`. Every back end reads this one description.
"""

from typing import NamedTuple

import torch


class Scoring(NamedTuple):
    """Description of the logits; plain tensors and numbers, as a custom operator takes them.

    Query `i` of T is aligned with key `i + S - T` of S: the last query with the last key. With
    scores `s = scale * q . k` the logit is `softcap * tanh(s / softcap)` if there is a cap, minus
    `slope * |aligned - key|` where there are slopes (ALiBi, arXiv 2108.12409).

    Attributes:
        scale: Factor on the products.
        left: Keys before the aligned one that a query sees, in arithmetic of `first`.
        right: Keys after it.
        softcap: Bound on the magnitude of a score (Gemma 2, arXiv 2408.00118); 0 for none.
        slopes: (H,) fp32, or None.
        diagonal: (B, T) int32, the key that each query is aligned with where that is not
            `i + S - T`; used for distances only.
        first: (B, T) int32, first key each query sees; None if `left` says it.
        last: (B, T) int32, one past the last key each query sees; set together with `first`.
        query_segments: (B, T) int32; a pair is seen only if segments are equal. None if the ranges
            say all.
        key_segments: (B, S) int32.
        kinds: (1 or B, 1 or H, Q blocks, K blocks) int32: HIDDEN, WHOLE, or the index into `pairs`.
        pairs: (N, block of queries, block of keys) bool, the blocks that are seen in part.
    """

    scale: float
    left: int
    right: int
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    kinds: torch.Tensor | None = None
    pairs: torch.Tensor | None = None


HIDDEN, WHOLE = -2, -1


def aligned_keys(scoring: Scoring, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the key that each query is aligned with, (B or 1, T)."""
    if scoring.diagonal is not None:
        return scoring.diagonal
    return torch.arange(keys - queries, keys, device=device)[None]


def key_ranges(
    scoring: Scoring, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return first and one past last key that each query sees, (B or 1, T) each."""
    if scoring.first is not None and scoring.last is not None:
        return scoring.first, scoring.last
    aligned = torch.arange(keys - queries, keys, device=device)[None]
    return (aligned - scoring.left).clamp(0, keys), (aligned + scoring.right + 1).clamp(0, keys)


def query_ranges(
    first: torch.Tensor, last: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each key, first and one past last query that may see it, (B, S) int32 each.

    The transpose of `key_ranges`, exact where the ranges move forward with the queries and wider
    than necessary elsewhere: a query between them need not see the key.
    """
    reach = last.cummax(-1).values.contiguous()
    floor = first.flip(-1).cummin(-1).values.flip(-1).contiguous()
    positions = torch.arange(keys, device=first.device, dtype=first.dtype)
    positions = positions.expand(first.shape[0], keys).contiguous()
    start = torch.searchsorted(reach, positions, right=True, out_int32=True)
    return start, torch.searchsorted(floor, positions, right=True, out_int32=True)


def visible(scoring: Scoring, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """Return all pairs that are seen as one mask, broadcastable to (B, H, T, S); None if that is
    every pair.
    """
    unbounded = scoring.left >= queries + keys and scoring.right >= queries + keys
    if unbounded and scoring.first is None and scoring.kinds is None:
        return None
    first, last = key_ranges(scoring, queries, keys, device)
    columns = torch.arange(keys, device=device)
    mask = ((columns >= first[..., None]) & (columns < last[..., None]))[:, None]
    if scoring.query_segments is not None and scoring.key_segments is not None:
        same = scoring.query_segments[:, :, None] == scoring.key_segments[:, None, :]
        mask = mask & same[:, None]
    if scoring.kinds is not None and scoring.pairs is not None:
        mask = mask & expand_blocks(scoring.kinds, scoring.pairs)[..., :queries, :keys]
    return mask


def expand_blocks(kinds: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return a block-sparse mask as a dense one, padded to whole blocks."""
    batch, heads, rows, columns = kinds.shape
    block_q, block_kv = pairs.shape[1:]
    tiles = torch.zeros((*kinds.shape, block_q, block_kv), dtype=torch.bool, device=kinds.device)
    tiles[kinds == WHOLE] = True
    partial = kinds >= 0
    tiles[partial] = pairs[kinds[partial].long()]
    return tiles.transpose(3, 4).reshape(batch, heads, rows * block_q, columns * block_kv)


def distance_bias(
    scoring: Scoring, queries: int, keys: int, device: torch.device
) -> torch.Tensor | None:
    """Return the ALiBi term of every pair, (B or 1, H, T, S) fp32, or None without slopes."""
    if scoring.slopes is None:
        return None
    aligned = aligned_keys(scoring, queries, keys, device)
    distance = (aligned[:, :, None] - torch.arange(keys, device=device)).abs()
    return -scoring.slopes[:, None, None] * distance[:, None]
