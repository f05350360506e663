"""What a caller of `attention` asked for, checked, and turned into a `Scoring`."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from interlace.kernels.attention.block_sparse import read_block_mask
from interlace.kernels.attention.scoring import Scoring
from interlace.kernels.attention.shared import made_once

Both = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""One tensor for keys and queries alike, or one for the queries and one for the keys."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one call, as `attention` documents them."""

    causal: bool | None = None
    window: int | tuple[int, int] | None = None
    segment_ids: Both | None = None
    cu_seqlens: Both | None = None
    block_mask: Any = None
    dilation: int = 1
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    scale: float | None = None
    return_lse: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether a query sees no key after the one it is aligned with."""
        return self.block_mask is None if self.causal is None else self.causal

    def reach(self, unbounded: int) -> tuple[int, int]:
        """Return how many keys before and after the aligned one a query sees."""
        if isinstance(self.window, tuple):
            left, right = (unbounded if side == -1 else side for side in self.window)
        else:
            left = right = unbounded if self.window is None else self.window - 1
        return left, 0 if self.is_causal else right


def describe(q: torch.Tensor, k: torch.Tensor, options: Options) -> Scoring:
    """Return the scoring of checked options; dilation and sinks are not part of it."""
    queries, keys = q.shape[2], k.shape[2]
    left, right = options.reach(queries + keys)
    kinds, pairs = (
        (None, None) if options.block_mask is None else read_block_mask(options.block_mask)
    )
    slopes = options.alibi_slopes
    scoring = Scoring(
        scale=1.0 / math.sqrt(q.shape[3]) if options.scale is None else float(options.scale),
        left=left,
        right=right,
        softcap=options.softcap or 0.0,
        slopes=None
        if slopes is None
        else slopes.detach().to(torch.promote_types(q.dtype, torch.float32)),
        kinds=kinds,
        pairs=pairs,
    )
    if options.segment_ids is not None:
        if isinstance(options.segment_ids, tuple):
            return in_segments(scoring, *options.segment_ids)
        ids = options.segment_ids
        key = ("segments", queries, scoring.left, scoring.right)
        cut = lambda: in_segments(scoring, ids[:, keys - queries :], ids)[5:10]  # noqa: E731
        return Scoring(*scoring[:5], *made_once(ids, key, cut), *scoring[10:])
    if options.cu_seqlens is not None:
        if isinstance(options.cu_seqlens, tuple):
            return in_documents(scoring, q, k, options.cu_seqlens)
        ids = options.cu_seqlens
        key = ("documents", q.shape[0], queries, keys, scoring.left, scoring.right)
        cut = lambda: in_documents(scoring, q, k, ids)[5:10]  # noqa: E731
        return Scoring(*scoring[:5], *made_once(ids, key, cut), *scoring[10:])
    return scoring


def in_segments(scoring: Scoring, of_queries: torch.Tensor, of_keys: torch.Tensor) -> Scoring:
    """Keep pairs of equal segments, given per query (B, T) and per key (B, S).

    Segments may come back later in a row: ids are compared pair by pair, inside the range from a
    segment's first key to its last.
    """
    keys = of_keys.shape[1]
    of_queries, of_keys = of_queries.contiguous(), of_keys.contiguous()
    ordered, places = of_keys.sort(dim=-1, stable=True)
    start = torch.searchsorted(ordered, of_queries)
    stop = torch.searchsorted(ordered, of_queries, right=True)
    first = places.gather(1, start.clamp(max=keys - 1))
    last = places.gather(1, (stop - 1).clamp(min=0)) + 1
    scoring = in_ranges(scoring, first, last.masked_fill(start == stop, 0), keys)
    # The place among the sorted ids stands for the id itself: it always fits 32 bits.
    return scoring._replace(
        query_segments=start.int(), key_segments=torch.searchsorted(ordered, of_keys).int()
    )


def in_documents(scoring: Scoring, q: torch.Tensor, k: torch.Tensor, cu_seqlens: Both) -> Scoring:
    """Keep pairs of the same document; documents follow each other, so ranges say it all."""
    of_queries, of_keys = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    of_queries, of_keys = of_queries.long(), of_keys.long()
    rows = torch.arange(q.shape[2], device=q.device)
    # What lies behind the last boundary is a document of its own, padding as a rule.
    of_queries = torch.cat([of_queries, of_queries.new_tensor([q.shape[2]])])
    of_keys = torch.cat([of_keys, of_keys.new_tensor([k.shape[2]])])
    document = torch.searchsorted(of_queries, rows, right=True) - 1
    document = document.clamp(0, len(of_queries) - 2)
    diagonal = rows - of_queries[document + 1] + of_keys[document + 1]
    scoring = scoring._replace(diagonal=diagonal.int()[None].expand(q.shape[0], -1).contiguous())
    batch = q.shape[0]
    first, last = of_keys[document], of_keys[document + 1]
    return in_ranges(scoring, first.expand(batch, -1), last.expand(batch, -1), k.shape[2])


def in_ranges(scoring: Scoring, first: torch.Tensor, last: torch.Tensor, keys: int) -> Scoring:
    """Cut causal order and window down to ranges of keys, (B, T) each."""
    queries = first.shape[1]
    aligned = torch.arange(keys - queries, keys, device=first.device)
    if scoring.diagonal is not None:
        aligned = scoring.diagonal
    first = first.clamp(min=0).maximum(aligned - scoring.left)
    last = last.minimum(aligned + scoring.right + 1).clamp(max=keys)
    # An empty range is empty where it stands, so that ranges keep moving forward.
    last = last.maximum(first)
    return scoring._replace(first=first.int().contiguous(), last=last.int().contiguous())
