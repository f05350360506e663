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

SHORT = 64
"""Queries that are worth a slice of their own where that avoids work for hidden pairs."""


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
    cutter = Cutter(q, k, scoring)
    return cutter.ranges() if scoring.kinds is None else cutter.blocks(scoring.kinds)


class Cutter:
    """Cuts the pairs of one call into slices."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, scoring: Scoring) -> None:
        self.batch, self.groups, self.ratio, self.queries = q.shape[:4]
        self.keys, self.scoring, self.device = k.shape[3], scoring, q.device
        self.first, self.last = key_ranges(scoring, self.queries, self.keys, q.device)

    def ranges(self) -> Iterator[Slice]:
        """Yield slices of as many queries as scores fit, with the keys their ranges span."""
        everything = slice(None)
        width = min(self.keys, self.scoring.left + self.scoring.right + 1)
        per_query = self.batch * self.groups * self.ratio * width
        count = max(LEAST_QUERIES, SCORES_AT_ONCE // per_query)
        # A slice meets keys that only some of its queries see: short slices waste fewer.
        count = min(count, max(SHORT, width // 4))
        lowest, highest = self.first.amin(0).tolist(), self.last.amax(0).tolist()
        for start in range(0, self.queries, count):
            queries = slice(start, min(start + count, self.queries))
            keys = slice(min(lowest[queries]), max(highest[queries]))
            if keys.start < keys.stop:
                yield self.cut(everything, everything, queries, keys)

    def blocks(self, kinds: torch.Tensor) -> Iterator[Slice]:
        """Yield one slice per block of queries, with the keys of the blocks that are not hidden.

        A mask that is not the same for all rows of the batch, or all heads, is cut for each.
        """
        rows, heads = kinds.shape[:2]
        for row in range(rows):
            batch = slice(None) if rows == 1 else slice(row, row + 1)
            for head in range(1 if heads == 1 else self.groups):
                group = slice(None) if heads == 1 else slice(head, head + 1)
                yield from self.listed(batch, group)

    def listed(self, batch: slice, heads: slice) -> Iterator[Slice]:
        """Yield the slices of blocks of some rows of the batch and key heads."""
        kinds, block_q, block_kv = self.kinds(batch, heads)
        wanted = (kinds != HIDDEN).any(0).any(0)
        inside = torch.arange(block_kv, device=self.device)
        for block in range(wanted.shape[0]):
            queries = slice(block * block_q, min((block + 1) * block_q, self.queries))
            keys = (wanted[block].nonzero() * block_kv + inside).flatten()
            keys = keys[keys < self.keys]
            if len(keys):
                yield self.cut(batch, heads, queries, keys)

    def kinds(self, batch: slice, heads: slice) -> tuple[torch.Tensor, int, int]:
        """Return the kinds of blocks for rows of the batch and key heads, and the block's sides."""
        assert self.scoring.kinds is not None and self.scoring.pairs is not None
        if heads.start is not None:
            heads = slice(heads.start * self.ratio, heads.stop * self.ratio)
        _, block_q, block_kv = self.scoring.pairs.shape
        return self.scoring.kinds[batch, heads], block_q, block_kv

    def cut(self, batch: slice, heads: slice, queries: slice, keys: slice | torch.Tensor) -> Slice:
        """Build one slice; a mask that shows everything is left out, as it is in most slices."""
        positions = keys
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.device)
        rows = batch if self.first.shape[0] > 1 else slice(None)
        first, last = self.first[rows, queries, None], self.last[rows, queries, None]
        seen = ((positions >= first) & (positions < last))[:, None, None]
        scoring = self.scoring
        if scoring.query_segments is not None and scoring.key_segments is not None:
            mine = scoring.query_segments[batch, queries]
            theirs = scoring.key_segments[batch][:, positions]
            seen = seen & (mine[..., None] == theirs[:, None])[:, None, None]
        if scoring.kinds is not None:
            seen = seen & self.pairs(batch, heads, queries, positions)
        mask = None if bool(seen.all()) else seen
        return Slice(batch, heads, queries, keys, mask, self.bias(batch, heads, queries, positions))

    def pairs(
        self, batch: slice, heads: slice, queries: slice, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return which pairs of one block of queries a block-sparse mask shows."""
        kinds, block_q, block_kv = self.kinds(batch, heads)
        assert self.scoring.pairs is not None
        blocks = (positions // block_kv).unique_consecutive()
        kinds = kinds[:, :, queries.start // block_q, None, blocks]
        dense = expand_blocks(kinds, self.scoring.pairs)
        dense = dense[:, :, : queries.stop - queries.start, : len(positions)]
        return dense.unflatten(1, (-1, 1 if dense.shape[1] == 1 else self.ratio))

    def bias(
        self, batch: slice, heads: slice, queries: slice, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the ALiBi term of one slice."""
        if self.scoring.slopes is None:
            return None
        aligned = aligned_keys(self.scoring, self.queries, self.keys, self.device)
        aligned = aligned[batch if aligned.shape[0] > 1 else slice(None), queries, None]
        distance = (aligned - positions).abs()[:, None, None]
        slopes = self.scoring.slopes.unflatten(0, (self.groups, self.ratio))[heads]
        return -slopes[:, :, None, None] * distance
