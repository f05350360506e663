"""Backward in two kernels, one by queries and one by keys: no atomics, equal bits every time.

The price of that is computing the scores twice: 7 products of tiles instead of 5
(FlashAttention-2, arXiv 2307.08691, algorithm 2, adds dQ up by atomics).
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from interlace.kernels.attention.triton.tiles import (
    bend,
    column_walk,
    key_at,
    key_range,
    load_aligned,
    load_lse,
    load_numbers,
    load_rows,
    load_slope,
    load_tile,
    operand,
    pairs_seen,
    pairs_seen_by_keys,
    product,
    query_at,
    query_range,
    row_walk,
    store_numbers,
    store_rows,
)


@triton.jit
def backward_rows_kernel(
    q, k, v, out, lse, grad_out, grad_lse, delta, grad_q,
    q_strides, k_strides, v_strides, out_strides, grad_out_strides, grad_q_strides,
    sizes, seen, blocks, how,
):  # fmt: skip
    """Write dQ and delta = <dO, O> - dL of one tile of queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * how.ROWS
    batch, head = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    key_head = head // sizes.ratio
    rows = start + tl.arange(0, how.ROWS)
    gradient = load_rows(grad_out, grad_out_strides, batch, head, rows, sizes.queries, how)
    outputs = load_rows(out, out_strides, batch, head, rows, sizes.queries, how)
    wide = lse.dtype.element_ty
    offset = tl.sum(gradient.to(wide) * outputs.to(wide), 1)
    if grad_lse is not None:
        offset -= load_numbers(grad_lse, sizes, batch, head, rows)
    store_numbers(delta, sizes, batch, head, rows, offset)
    queries = load_rows(q, q_strides, batch, head, rows, sizes.queries, how)
    first, last = key_range(seen, sizes, batch, rows)
    aligned = load_aligned(seen, sizes, batch, rows[:, None], how)
    slope = load_slope(seen, head, how)
    level = load_lse(lse, sizes, batch, head, rows)
    sums = tl.zeros([how.ROWS, how.PADDED], wide)
    walk = row_walk(seen, sizes, blocks, batch, head, rows, first, last, how)
    for stage in tl.static_range(3):
        for step in tl.range(walk[stage], walk[stage + 1]):
            at, kind = key_at(blocks, batch, head, rows, step, how)
            columns = at + tl.arange(0, how.COLUMNS)
            keys = load_tile(k, k_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            values = load_tile(v, v_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            products = product(queries, tl.trans(keys), how)
            logits, bent = bend(products, aligned, columns[None, :], slope, sizes, how)
            weights = tl.exp2(logits - level[:, None])
            if stage != 1:
                pairs = pairs_seen(
                    seen, sizes, blocks, batch, rows, columns, first, last, kind, how
                )
                weights = tl.where(pairs, weights, 0.0)
            scores = weights * (product(gradient, tl.trans(values), how) - offset[:, None])
            if how.SOFTCAP:
                scores *= 1.0 - bent * bent
            sums += product(operand(scores, k, how), keys, how)
    sums *= sizes.scale
    store_rows(grad_q, grad_q_strides, batch, head, rows, sizes.queries, sums, how)


@triton.jit
def backward_columns_kernel(
    q, k, v, lse, grad_out, delta, grad_k, grad_v,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides,
    sizes, seen, blocks, how,
):  # fmt: skip
    """Write dK and dV of one tile of keys of one key head, summed over its query heads.

    Tiles are transposed: keys by queries.
    """
    key_heads = sizes.heads // sizes.ratio
    batch, key_head = tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    columns = tl.program_id(0) * how.COLUMNS + tl.arange(0, how.COLUMNS)
    keys = load_rows(k, k_strides, batch, key_head, columns, sizes.keys, how)
    values = load_rows(v, v_strides, batch, key_head, columns, sizes.keys, how)
    above, below = query_range(seen, sizes, batch, columns)
    sums_k = tl.zeros([how.COLUMNS, how.PADDED], lse.dtype.element_ty)
    sums_v = tl.zeros([how.COLUMNS, how.PADDED], lse.dtype.element_ty)
    for member in tl.range(0, sizes.ratio):
        head = key_head * sizes.ratio + member
        slope = load_slope(seen, head, how)
        walk = column_walk(seen, sizes, blocks, batch, head, columns, above, below, how)
        for stage in tl.static_range(3):
            for step in tl.range(walk[stage], walk[stage + 1]):
                at, kind = query_at(blocks, batch, head, columns, step, how)
                rows = at + tl.arange(0, how.ROWS)
                queries = load_tile(q, q_strides, batch, head, at, how.ROWS, sizes.queries, how)
                gradient = load_tile(
                    grad_out, grad_out_strides, batch, head, at, how.ROWS, sizes.queries, how
                )
                level = load_lse(lse, sizes, batch, head, rows)
                offset = load_numbers(delta, sizes, batch, head, rows)
                aligned = load_aligned(seen, sizes, batch, rows[None, :], how)
                products = product(keys, tl.trans(queries), how)
                logits, bent = bend(products, aligned, columns[:, None], slope, sizes, how)
                weights = tl.exp2(logits - level[None, :])
                if stage != 1:
                    pairs = pairs_seen_by_keys(
                        seen, sizes, blocks, batch, rows, columns, above, below, kind, how
                    )
                    weights = tl.where(pairs, weights, 0.0)
                sums_v += product(operand(weights, grad_out, how), gradient, how)
                scores = weights * (product(values, tl.trans(gradient), how) - offset[None, :])
                if how.SOFTCAP:
                    scores *= 1.0 - bent * bent
                sums_k += product(operand(scores, q, how), queries, how)
    sums_k *= sizes.scale
    store_rows(grad_k, grad_k_strides, batch, key_head, columns, sizes.keys, sums_k, how)
    store_rows(grad_v, grad_v_strides, batch, key_head, columns, sizes.keys, sums_v, how)
