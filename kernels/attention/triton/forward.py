"""Forward: online softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691, algorithm 1)."""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from interlace.kernels.attention.triton.tiles import (
    LOG2E,
    bend,
    key_at,
    key_range,
    load_aligned,
    load_rows,
    load_slope,
    load_tile,
    operand,
    pairs_seen,
    product,
    row_walk,
    store_numbers,
    store_rows,
)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, sizes, seen, blocks, how
):
    """Write output and log-sum-exp of one tile of queries of one head."""
    # Late queries see most keys: they go first, so that the end is not spent waiting for one.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * how.ROWS
    batch, head = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    key_head = head // sizes.ratio
    rows = start + tl.arange(0, how.ROWS)
    queries = load_rows(q, q_strides, batch, head, rows, sizes.queries, how)
    first, last = key_range(seen, sizes, batch, rows)
    aligned = load_aligned(seen, sizes, batch, rows[:, None], how)
    slope = load_slope(seen, head, how)
    top = tl.full([how.ROWS], float("-inf"), lse.dtype.element_ty)
    total = tl.zeros([how.ROWS], lse.dtype.element_ty)
    sums = tl.zeros([how.ROWS, how.PADDED], lse.dtype.element_ty)
    walk = row_walk(seen, sizes, blocks, batch, head, rows, first, last, how)
    for stage in tl.static_range(3):
        for step in tl.range(walk[stage], walk[stage + 1]):
            at, kind = key_at(blocks, batch, head, rows, step, how)
            columns = at + tl.arange(0, how.COLUMNS)
            keys = load_tile(k, k_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            products = product(queries, tl.trans(keys), how)
            logits, _ = bend(products, aligned, columns[None, :], slope, sizes, how)
            if stage != 1:
                pairs = pairs_seen(
                    seen, sizes, blocks, batch, rows, columns, first, last, kind, how
                )
                logits = tl.where(pairs, logits, float("-inf"))
            highest = tl.maximum(top, tl.max(logits, 1))
            # Before its first key a row has no maximum to subtract.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(top - base)
            values = load_tile(v, v_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            sums = sums * shrink[:, None] + product(operand(weights, v, how), values, how)
            total = total * shrink + tl.sum(weights, 1)
            top = highest
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    result = sums / divisor[:, None]
    store_rows(out, out_strides, batch, head, rows, sizes.queries, result, how)
    logs = tl.where(empty, float("-inf"), (top + tl.log2(divisor)) / LOG2E)
    store_numbers(lse, sizes, batch, head, rows, logs)
