"""Which keys each slice of queries can see: the order of work of the chunked back end.

Nothing is computed for pairs outside of a slice: keys outside of all its queries' ranges, and
blocks that a block-sparse mask hides, cost nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from interlace.kernels.attention.scoring import (
    HIDDEN,
    Scoring,
    aligned_keys,
    expand_blocks,
    key_ranges,
)

SCORES_AT_ONCE = 2**21
"""Scores of one slice over batch and heads: 8 MiB in fp32, about what stays in caches."""

LEAST_QUERIES = 16


@dataclass(frozen=True)
class Slice:
    """Some queries and the keys they can see, for part of the batch and of the key heads.

    Tensors are seen as (B, G, H / G, queries, ...) and (B, G, 1, keys, ...).

    Attributes:
        batch: Rows of the batch.
        heads: Key heads; each stands for its H / G query heads.
        queries: Positions of the queries.
        keys: Positions of the keys: a range, or (n,) indices.
        mask: Pairs that are seen, broadcastable to (B, G, H / G, queries, keys); None for all.
        bias: Added to the scores, fp32, broadcastable likewise; None for nothing.
    """

    batch: slice
    heads: slice
    queries: slice
    keys: slice | torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the queries' part of (B, G, H / G, T, ...), as a view."""
        return tensor[self.batch, self.heads, :, self.queries]

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the keys' part of (B, G, 1, S, ...)."""
        return tensor[self.batch, self.heads, :, self.keys]


def slices(q: torch.Tensor, k: torch.Tensor, scoring: Scoring) -> Iterator[Slice]:
    """Yield the slices that together hold every pair that is seen, each once.

    Args:
        q: (B, G, H / G, T, K).
        k: (B, G, 1, S, K).
        scoring: What is seen.
    """
    everything = slice(None)
    first, last = key_ranges(scoring, q.shape[3], k.shape[3], q.device)
    if scoring.kinds is None:
        size = max(1, q.shape[0] * q.shape[1] * q.shape[2])
        width = min(k.shape[3], scoring.left + scoring.right + 1)
        count = max(LEAST_QUERIES, SCORES_AT_ONCE // max(1, size * width))
        lowest, highest = first.amin(0).tolist(), last.amax(0).tolist()
        for start in range(0, q.shape[3], count):
            queries = slice(start, min(start + count, q.shape[3]))
            keys = slice(min(lowest[queries]), max(highest[queries]))
            if keys.start < keys.stop:
                yield cut(q, k, scoring, everything, everything, queries, keys, (first, last))
        return
    for row in range(scoring.kinds.shape[0]):
        batch = everything if scoring.kinds.shape[0] == 1 else slice(row, row + 1)
        shared = scoring.kinds.shape[1] == 1
        for head in range(1 if shared else k.shape[1]):
            heads = everything if shared else slice(head, head + 1)
            yield from block_slices(q, k, scoring, batch, heads, (first, last))


def block_slices(
    q: torch.Tensor,
    k: torch.Tensor,
    scoring: Scoring,
    batch: slice,
    heads: slice,
    ranges: tuple[torch.Tensor, torch.Tensor],
) -> Iterator[Slice]:
    """Yield one slice per block of queries, with the keys of the blocks that are not hidden."""
    assert scoring.kinds is not None and scoring.pairs is not None
    block_q, block_kv = scoring.pairs.shape[1:]
    kinds = scoring.kinds[batch, query_heads(heads, q.shape[2])]
    wanted = (kinds != HIDDEN).any(0).any(0)
    inside = torch.arange(block_kv, device=q.device)
    for block in range(wanted.shape[0]):
        queries = slice(block * block_q, min((block + 1) * block_q, q.shape[3]))
        keys = (wanted[block].nonzero() * block_kv + inside).flatten()
        keys = keys[keys < k.shape[3]]
        if queries.start < queries.stop and len(keys):
            yield cut(q, k, scoring, batch, heads, queries, keys, ranges)


def query_heads(heads: slice, groups: int) -> slice:
    """Return the query heads that key heads stand for."""
    return heads if heads.start is None else slice(heads.start * groups, heads.stop * groups)


def cut(
    q: torch.Tensor,
    k: torch.Tensor,
    scoring: Scoring,
    batch: slice,
    heads: slice,
    queries: slice,
    keys: slice | torch.Tensor,
    ranges: tuple[torch.Tensor, torch.Tensor],
) -> Slice:
    """Build one slice with its mask and bias."""
    positions = keys
    if isinstance(keys, slice):
        positions = torch.arange(keys.start, keys.stop, device=q.device)
    assert isinstance(positions, torch.Tensor)
    part = batch if ranges[0].shape[0] > 1 else slice(None)
    first, last = (bound[part, queries, None] for bound in ranges)
    # (B, 1, 1, queries, keys); left out where it is true everywhere, which is most slices.
    seen = ((positions >= first) & (positions < last))[:, None, None]
    if scoring.query_segments is not None and scoring.key_segments is not None:
        of_keys = scoring.key_segments[batch][:, positions]
        of_queries = scoring.query_segments[batch, queries]
        seen = seen & (of_queries[..., None] == of_keys[:, None])[:, None, None]
    if scoring.kinds is not None and scoring.pairs is not None:
        block_q, block_kv = scoring.pairs.shape[1:]
        kinds = scoring.kinds[batch, query_heads(heads, q.shape[2]), queries.start // block_q, None]
        blocks = (positions[::1] // block_kv).unique_consecutive()
        dense = expand_blocks(kinds[..., blocks], scoring.pairs)
        dense = dense[:, :, : queries.stop - queries.start, : len(positions)]
        seen = seen & dense.unflatten(1, (-1, 1 if dense.shape[1] == 1 else q.shape[2]))
    mask = None if bool(seen.all()) else seen
    return Slice(
        batch, heads, queries, keys, mask, bias(q, k, scoring, batch, heads, queries, positions)
    )


def bias(
    q: torch.Tensor,
    k: torch.Tensor,
    scoring: Scoring,
    batch: slice,
    heads: slice,
    queries: slice,
    positions: torch.Tensor,
) -> torch.Tensor | None:
    """Return the ALiBi term of one slice."""
    if scoring.slopes is None:
        return None
    aligned = aligned_keys(scoring, q.shape[3], k.shape[3], q.device)
    aligned = aligned[batch if aligned.shape[0] > 1 else slice(None), queries, None]
    distance = (aligned - positions).abs()[:, None, None]
    slopes = scoring.slopes.unflatten(0, (k.shape[1], q.shape[2]))[heads]
    return -slopes[:, :, None, None] * distance
