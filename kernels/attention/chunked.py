"""Attention by slices of queries in plain torch: linear memory, any device, any order.

Each slice meets all the keys it can see at once, so no running maximum is needed, and the second
derivative takes one pass: the sums over a row are at hand before the row's terms are. The formulas
are those of the tiled kernels in `triton_backward` and `triton_double_backward`.
Recorded by autograd, the functions give derivatives of any order, then in quadratic memory.
"""

import torch

from interlace.kernels.attention.scoring import Scoring
from interlace.kernels.attention.slices import Slice, slices


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, H, T, K), and the log-sum-exp of the logits (B, H, T), fp32 at least;
    zeros and minus infinity where a query sees no key.
    """
    queries, keys, values = by_rows(q, k), by_columns(k), by_columns(v)
    out = torch.zeros_like(queries)
    lse = queries.new_full((*queries.shape[:4], 1), float("-inf"))
    for part in slices(queries, keys, scoring):
        logits, _, _ = bend(part, part.rows(queries), part.columns(keys), scoring)
        total = logits.logsumexp(-1, keepdim=True)
        part.rows(out)[:] = (logits - finite(total)).exp() @ part.columns(values)
        part.rows(lse)[:] = total
    return as_given(out, q), lse.squeeze(-1).flatten(1, 2)


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v for cotangents of the output and the log-sum-exp."""
    queries, keys, values = by_rows(q, k), by_columns(k), by_columns(v)
    cotangents, total = by_rows(grad_out, k), finite(row_numbers(lse, k))
    delta = deltas(out, grad_out, grad_lse, k)
    grad_q, grad_k, grad_v = (torch.zeros_like(each) for each in (queries, keys, values))
    for part in slices(queries, keys, scoring):
        of_rows, of_columns, gradient = (
            part.rows(queries),
            part.columns(keys),
            part.rows(cotangents),
        )
        logits, slope, _ = bend(part, of_rows, of_columns, scoring)
        weights = (logits - part.rows(total)).exp()
        score = weights * (gradient @ part.columns(values).mT - part.rows(delta))
        score = scoring.scale * times(score, slope)
        part.rows(grad_q)[:] = score @ of_columns
        add_columns(grad_k, part, score.mT @ of_rows)
        add_columns(grad_v, part, weights.mT @ gradient)
    return as_given(grad_q, q), as_given(grad_k, k), as_given(grad_v, v)


def tangent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    along_q: torch.Tensor,
    along_k: torch.Tensor,
    along_v: torch.Tensor,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the derivatives of the output and the log-sum-exp along tangents of q, k and v."""
    queries, keys, values = by_rows(q, k), by_columns(k), by_columns(v)
    outputs, total = by_rows(out, k), finite(row_numbers(lse, k))
    moves = by_rows(along_q, k), by_columns(along_k), by_columns(along_v)
    along_out, along_lse = torch.zeros_like(queries), torch.zeros_like(total)
    for part in slices(queries, keys, scoring):
        logits, slope, _ = bend(part, part.rows(queries), part.columns(keys), scoring)
        weights = (logits - part.rows(total)).exp()
        moved = weights * times(moved_scores(part, queries, keys, moves, scoring), slope)
        mean = moved.sum(-1, keepdim=True)
        result = moved @ part.columns(values) - mean * part.rows(outputs)
        part.rows(along_out)[:] = result + weights @ part.columns(moves[2])
        part.rows(along_lse)[:] = mean
    return as_given(along_out, out), along_lse.squeeze(-1).flatten(1, 2)


def double_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    grad_q: torch.Tensor,
    along_q: torch.Tensor,
    along_k: torch.Tensor,
    along_v: torch.Tensor,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `<gradients of q, k, v; along_q, along_k, along_v>` with respect to
    q, k, v, `grad_out` and `grad_lse`; the last two are the derivatives of output and log-sum-exp.

    `grad_q`, the first gradient, saves other back ends a pass; this one has no need of it.
    """
    del grad_q
    queries, keys, values = by_rows(q, k), by_columns(k), by_columns(v)
    total = finite(row_numbers(lse, k))
    cotangents, delta = by_rows(grad_out, k), deltas(out, grad_out, grad_lse, k)
    moves = by_rows(along_q, k), by_columns(along_k), by_columns(along_v)
    second_q, second_k, second_v = (torch.zeros_like(each) for each in (queries, keys, values))
    along_out, along_lse = torch.zeros_like(queries), torch.zeros_like(total)
    for part in slices(queries, keys, scoring):
        of_rows, of_columns, gradient = (
            part.rows(queries),
            part.columns(keys),
            part.rows(cotangents),
        )
        logits, slope, bow = bend(part, of_rows, of_columns, scoring)
        weights = (logits - part.rows(total)).exp()
        plain = moved_scores(part, queries, keys, moves, scoring)
        moved = times(plain, slope)
        mean = (weights * moved).sum(-1, keepdim=True)
        centred = weights * (moved - mean)
        result = centred @ part.columns(values) + weights @ part.columns(moves[2])
        # Row sums of the outer term vanish: its mean is <gradient, result>, no pass of its own.
        pull = gradient @ part.columns(values).mT - part.rows(delta)
        score, outer = weights * pull, centred * pull
        constant = (gradient * result).sum(-1, keepdim=True)
        outer = outer + weights * (gradient @ part.columns(moves[2]).mT - constant)
        if slope is not None and bow is not None:
            outer, score = outer * slope + score * plain * bow, score * slope
        outer, score = scoring.scale * outer, scoring.scale * score
        part.rows(second_q)[:] = outer @ of_columns + score @ part.columns(moves[1])
        add_columns(second_k, part, outer.mT @ of_rows + score.mT @ part.rows(moves[0]))
        add_columns(second_v, part, centred.mT @ gradient)
        part.rows(along_out)[:], part.rows(along_lse)[:] = result, mean
    gradients = as_given(second_q, q), as_given(second_k, k), as_given(second_v, v)
    return *gradients, as_given(along_out, grad_out), along_lse.squeeze(-1).flatten(1, 2)


def bend(
    part: Slice, queries: torch.Tensor, keys: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the logits of a slice, minus infinity where a pair is not seen, and first and second
    derivative of the soft cap (None without one).
    """
    logits, slope, bow = scoring.scale * (queries @ keys.mT), None, None
    if scoring.softcap:
        bent = torch.tanh(logits / scoring.softcap)
        logits, slope = scoring.softcap * bent, 1.0 - bent.square()
        bow = -2.0 / scoring.softcap * bent * slope
    if part.bias is not None:
        logits = logits + part.bias
    if part.mask is not None:
        logits = logits.masked_fill(~part.mask, float("-inf"))
    return logits, slope, bow


def moved_scores(
    part: Slice,
    queries: torch.Tensor,
    keys: torch.Tensor,
    moves: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scoring: Scoring,
) -> torch.Tensor:
    """Return the derivative of a slice's scores, before the soft cap, along the tangents."""
    of_queries = part.rows(moves[0]) @ part.columns(keys).mT
    return scoring.scale * (of_queries + part.rows(queries) @ part.columns(moves[1]).mT)


def deltas(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, k: torch.Tensor
) -> torch.Tensor:
    """Return `<grad_out, out> - grad_lse` per query, (B, G, H / G, T, 1)."""
    products = by_rows(grad_out, k) * by_rows(out, k)
    delta = products.sum(-1, keepdim=True)
    return delta if grad_lse is None else delta - row_numbers(grad_lse, k)


def by_rows(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return (B, H, T, K) as (B, G, H / G, T, K), in fp32 at least."""
    return x.unflatten(1, (k.shape[1], -1)).to(torch.promote_types(x.dtype, torch.float32))


def by_columns(x: torch.Tensor) -> torch.Tensor:
    """Return (B, G, S, K) as (B, G, 1, S, K), in fp32 at least."""
    return x.unsqueeze(2).to(torch.promote_types(x.dtype, torch.float32))


def row_numbers(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return (B, H, T) as (B, G, H / G, T, 1)."""
    return x.unflatten(1, (k.shape[1], -1)).unsqueeze(-1)


def as_given(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a result in the shape and dtype of what it belongs to."""
    return x.flatten(1, 2).to(like.dtype)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp with 0 for queries that see no key: their weights then are zeros."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return the product with a factor that may be absent."""
    return x if factor is None else x * factor


def add_columns(total: torch.Tensor, part: Slice, values: torch.Tensor) -> None:
    """Add values (B, G, H / G, keys, K), summed over query heads, to keys' totals in place."""
    if isinstance(part.keys, slice):
        part.columns(total).add_(values.sum(2, keepdim=True))
    else:
        view = total[part.batch, part.heads]
        view.index_add_(3, part.keys, values.sum(2, keepdim=True))
