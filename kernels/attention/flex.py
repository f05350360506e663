"""Attention by torch's FlexAttention (arXiv 2412.05496): masks and score changes compiled into one
Triton kernel that skips hidden blocks.

First order only: its backward cannot be differentiated. On a CPU it has no backward at all, and
runs unfused, for tests. The block mask is built from ranges of keys, block by block: nothing of
the size of all pairs is ever made.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch

from interlace.kernels.attention.first_order import first_order_only
from interlace.kernels.attention.request import Request
from interlace.kernels.attention.scoring import (
    HIDDEN,
    WHOLE,
    Scoring,
    aligned_keys,
    key_ranges,
)
from interlace.kernels.attention.shared import made_once
from interlace.kernels.triton_language import why_no_triton

BLOCK = 128
"""Queries and keys of one block."""

Tensor = torch.Tensor


def obstacle(request: Request) -> str | None:
    """Return why FlexAttention cannot serve a request, or None."""
    if request.compiling:
        return "inside torch.compile its block mask would be made anew in every graph"
    if request.device == "cpu":
        return "it has no backward on a CPU" if request.needs_grad else None
    if request.device != "cuda":
        return f"it runs on GPUs, and the tensors are on {request.device}"
    if request.dtype is torch.float64:
        return "its kernels take fp32, fp16 and bf16"
    if not 16 <= request.head_width <= 256:
        return f"its kernels take heads 16 to 256 wide, these are {request.head_width}"
    return why_no_triton()


def attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; see `reference`."""
    queries, keys = q.shape[2], k.shape[2]
    if not torch.is_grad_enabled():
        # On a CPU it refuses tensors that want a gradient, even where none is recorded.
        q, k, v = q.detach(), k.detach(), v.detach()
    settings = {
        "block_mask": block_mask_of(scoring, queries, keys, q.device),
        "score_mod": score_change(scoring, queries, keys, q.device),
        "scale": scoring.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    out, lse = with_lse(kernel(q.device.type), (q, k, v), settings)
    return first_order_only(out, "flex"), first_order_only(lse, "flex")


@cache
def kernel(device: str) -> Callable[..., Any]:
    """Return FlexAttention, compiled where it has a fused kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def with_lse(
    run: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor], settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Call FlexAttention for output and log-sum-exp, as this version of torch wants to be asked."""
    from torch.nn.attention import flex_attention

    # `return_lse` is going away in favour of `return_aux`, which older versions do not have.
    request = getattr(flex_attention, "AuxRequest", None)
    if request is None:
        return run(*inputs, return_lse=True, **settings)
    out, extra = run(*inputs, return_aux=request(lse=True), **settings)
    return out, extra.lse


def score_change(
    scoring: Scoring, queries: int, keys: int, device: torch.device
) -> Callable[..., Tensor] | None:
    """Return soft cap and ALiBi as a function of one score, or None where there is neither."""
    cap, slopes = scoring.softcap, scoring.slopes
    if not cap and slopes is None:
        return None
    aligned = aligned_keys(scoring, queries, keys, device)
    every_row = aligned.shape[0] == 1

    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            middle = aligned[batch * 0 if every_row else batch, query]
            score = score - slopes[head] * (middle - key).abs()
        return score

    return change


def block_mask_of(scoring: Scoring, queries: int, keys: int, device: torch.device) -> Any:
    """Return the scoring's mask as torch takes it, or None where every pair is seen."""
    unbounded = scoring.left >= queries + keys and scoring.right >= queries + keys
    if unbounded and scoring.first is None and scoring.kinds is None:
        return None
    key = (queries, keys, scoring.left, scoring.right)
    if scoring.first is None and scoring.kinds is None:
        return made_of_numbers(key, device)
    if scoring.first is not None and scoring.kinds is not None:
        return make_block_mask(scoring, queries, keys, device)
    # Segments come and go with `first`, and `pairs` with `kinds`: one stands for both.
    source = scoring.kinds if scoring.first is None else scoring.first
    assert source is not None
    # Without the tensors themselves, so that the mask does not keep them alive by its own.
    tensors = {
        name: each.detach()
        for name, each in scoring._asdict().items()
        if isinstance(each, torch.Tensor)
    }
    apart = scoring._replace(**tensors)
    return made_once(source, ("flex", key), lambda: make_block_mask(apart, queries, keys, device))


@lru_cache(maxsize=64)
def made_of_numbers(key: tuple[int, int, int, int], device: torch.device) -> Any:
    """Return the mask of causal order and windows, which numbers say in full."""
    queries, keys, left, right = key
    return make_block_mask(Scoring(1.0, left, right), queries, keys, device)


def make_block_mask(scoring: Scoring, queries: int, keys: int, device: torch.device) -> Any:
    """Build a `BlockMask` from lists of blocks that are seen whole and in part."""
    from torch.nn.attention.flex_attention import BlockMask

    sizes = (BLOCK, BLOCK) if scoring.pairs is None else tuple(scoring.pairs.shape[1:])
    seen, whole = blocks_seen(scoring, queries, keys, device, sizes)
    return BlockMask.from_kv_blocks(
        *as_lists(seen & ~whole),
        *as_lists(whole),
        BLOCK_SIZE=(int(sizes[0]), int(sizes[1])),
        mask_mod=pair_test(scoring, queries, keys, device),
        seq_lengths=(queries, keys),
    )


def blocks_seen(
    scoring: Scoring, queries: int, keys: int, device: torch.device, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return which blocks hold pairs that may be seen, and which hold only such, as booleans
    (1 or B, 1 or H, blocks of queries, blocks of keys).
    """
    first, last = (each.int() for each in key_ranges(scoring, queries, keys, device))
    start = torch.arange(0, keys, sizes[1], device=device, dtype=torch.int32)
    stop = (start + sizes[1]).clamp(max=keys)
    # A query without any key must not widen its block, nor let it count as whole.
    empty = first >= last
    lowest = in_blocks(first.masked_fill(empty, keys), sizes[0], keys).amin(-1)[..., None]
    highest = in_blocks(last.masked_fill(empty, 0), sizes[0], 0).amax(-1)[..., None]
    seen = (start < highest) & (stop > lowest)
    latest = in_blocks(first, sizes[0], 0).amax(-1)[..., None]
    earliest = in_blocks(last, sizes[0], keys).amin(-1)[..., None]
    whole = (start >= latest) & (stop <= earliest)
    if scoring.query_segments is not None and scoring.key_segments is not None:
        least, most = (extent(scoring.query_segments, sizes[0], n)[..., None] for n in (0, 1))
        low, high = (extent(scoring.key_segments, sizes[1], n)[:, None] for n in (0, 1))
        seen = seen & (least <= high) & (most >= low)
        whole = whole & (least == most) & (low == high) & (least == low)
    seen, whole = seen[:, None], (seen & whole)[:, None]
    if scoring.kinds is not None:
        seen, whole = seen & (scoring.kinds != HIDDEN), whole & (scoring.kinds == WHOLE)
    return seen, whole


def in_blocks(values: Tensor, size: int, filler: int) -> Tensor:
    """Return (B, T) as (B, blocks, size), the last block filled up."""
    spare = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, spare), value=filler).unflatten(1, (-1, size))


def extent(ids: Tensor, size: int, which: int) -> Tensor:
    """Return the least (0) or the greatest (1) id of every block, (B, blocks)."""
    limits = torch.iinfo(ids.dtype)
    blocks = in_blocks(ids, size, limits.min if which else limits.max)
    return blocks.amax(-1) if which else blocks.amin(-1)


def as_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return booleans over blocks of keys as counts and indices, those that are chosen first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int().contiguous()


def pair_test(
    scoring: Scoring, queries: int, keys: int, device: torch.device
) -> Callable[..., Tensor]:
    """Return the mask as a function of one pair."""
    first, last = (each.int() for each in key_ranges(scoring, queries, keys, device))
    of_queries, of_keys = scoring.query_segments, scoring.key_segments
    kinds, pairs = scoring.kinds, scoring.pairs
    every_row = first.shape[0] == 1

    def test(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch * 0 if every_row else batch
        seen = (key >= first[row, query]) & (key < last[row, query])
        if of_queries is not None and of_keys is not None:
            seen = seen & (of_queries[batch, query] == of_keys[batch, key])
        if kinds is not None and pairs is not None:
            high, wide = pairs.shape[1:]
            row = batch * 0 if kinds.shape[0] == 1 else batch
            column = head * 0 if kinds.shape[1] == 1 else head
            kind = kinds[row, column, query // high, key // wide]
            if pairs.shape[0]:
                inside = pairs[kind.clamp(min=0), query % high, key % wide]
                seen = seen & ((kind == WHOLE) | ((kind >= 0) & inside))
            else:
                seen = seen & (kind == WHOLE)
        return seen

    return test
