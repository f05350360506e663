"""Double backward and tangent: two passes over the scores, no atomics, four numbers per row.

With cotangents x, y, z of dQ, dK, dV, per tile (i queries, j keys):

    S = scale q k'      P = exp(S - L)           R = scale (x k' + q y')
    D = g v' - delta    E = g z'                 rho = rowsum(P R)
    tangent of O:  U = (P R) v + P z - rho O     c = <g, U>
    T = P ((R - rho) D + E - c)                  dS = P D

    gQ = scale (T k + dS y)    gK = scale (T' q + dS' x)    gV = (P (R - rho))' g

The row kernel finds rho and c only at its end. It can apply them there, because they enter gQ
linearly: gQ = scale (A - c P k) - rho dQ with A from the uncentred T (10 products, and 8 of the
column kernel: 18). Or the tangent kernel goes first (5 products) and the row kernel knows them
(7: 20 in all). fp32 takes the first form. Tiles that are rounded to 16 bits take the second
(`CENTRED`): gQ's error is up to a quarter smaller in bf16, the other results' is the same, and two
of three accumulators need no registers.

A soft cap with tanh t has the slope h = 1 - t^2 and the bow h' = -2 t h / cap: R, dS and T take the
factor h on their way, and T the term dS R h' / h.
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
def tangent_kernel(
    q, k, v, x, y, z, out, lse, along_out, along_lse,
    q_strides, k_strides, v_strides, x_strides, y_strides, z_strides, out_strides, along_strides,
    sizes, seen, blocks, how,
):  # fmt: skip
    """Write U and rho of one tile of queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * how.ROWS
    batch, head = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    key_head = head // sizes.ratio
    rows = start + tl.arange(0, how.ROWS)
    queries = load_rows(q, q_strides, batch, head, rows, sizes.queries, how)
    moves_q = load_rows(x, x_strides, batch, head, rows, sizes.queries, how)
    first, last = key_range(seen, sizes, batch, rows)
    aligned = load_aligned(seen, sizes, batch, rows[:, None], how)
    slope = load_slope(seen, head, how)
    level = load_lse(lse, sizes, batch, head, rows)
    mean = tl.zeros([how.ROWS], lse.dtype.element_ty)
    sums = tl.zeros([how.ROWS, how.PADDED], lse.dtype.element_ty)
    walk = row_walk(seen, sizes, blocks, batch, head, rows, first, last, how)
    for stage in tl.static_range(3):
        for step in tl.range(walk[stage], walk[stage + 1]):
            at, kind = key_at(blocks, batch, head, rows, step, how)
            columns = at + tl.arange(0, how.COLUMNS)
            keys = load_tile(k, k_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            moves_k = load_tile(y, y_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            products = product(queries, tl.trans(keys), how)
            logits, bent = bend(products, aligned, columns[None, :], slope, sizes, how)
            weights = tl.exp2(logits - level[:, None])
            if stage != 1:
                pairs = pairs_seen(
                    seen, sizes, blocks, batch, rows, columns, first, last, kind, how
                )
                weights = tl.where(pairs, weights, 0.0)
            moved = product(moves_q, tl.trans(keys), how)
            moved = (moved + product(queries, tl.trans(moves_k), how)) * sizes.scale
            if how.SOFTCAP:
                moved *= 1.0 - bent * bent
            moved *= weights
            mean += tl.sum(moved, 1)
            values = load_tile(v, v_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            sums += product(operand(moved, v, how), values, how)
            moves_v = load_tile(z, z_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            sums += product(operand(weights, z, how), moves_v, how)
    outputs = load_rows(out, out_strides, batch, head, rows, sizes.queries, how)
    sums -= mean[:, None] * outputs
    store_rows(along_out, along_strides, batch, head, rows, sizes.queries, sums, how)
    store_numbers(along_lse, sizes, batch, head, rows, mean)


@triton.jit
def double_backward_rows_kernel(
    q, k, v, x, y, z, out, lse, grad_out, grad_lse, grad_q,
    delta, along_out, along_lse, constant, second_q,
    q_strides, k_strides, v_strides, x_strides, y_strides, z_strides,
    out_strides, grad_out_strides, grad_q_strides, along_strides, second_q_strides,
    sizes, seen, blocks, how,
):  # fmt: skip
    """Write gQ, delta and c of one tile of queries of one head, and U and rho where nobody did."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * how.ROWS
    batch, head = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    key_head = head // sizes.ratio
    rows = start + tl.arange(0, how.ROWS)
    wide = lse.dtype.element_ty
    queries = load_rows(q, q_strides, batch, head, rows, sizes.queries, how)
    moves_q = load_rows(x, x_strides, batch, head, rows, sizes.queries, how)
    gradient = load_rows(grad_out, grad_out_strides, batch, head, rows, sizes.queries, how)
    first, last = key_range(seen, sizes, batch, rows)
    aligned = load_aligned(seen, sizes, batch, rows[:, None], how)
    slope = load_slope(seen, head, how)
    level = load_lse(lse, sizes, batch, head, rows)
    outputs = load_rows(out, out_strides, batch, head, rows, sizes.queries, how)
    offset = tl.sum(gradient.to(wide) * outputs.to(wide), 1)
    if grad_lse is not None:
        offset -= load_numbers(grad_lse, sizes, batch, head, rows)
    store_numbers(delta, sizes, batch, head, rows, offset)
    mean, fixed = tl.zeros([how.ROWS], wide), tl.zeros([how.ROWS], wide)
    if how.CENTRED:
        mean = load_numbers(along_lse, sizes, batch, head, rows)
        result = load_rows(along_out, along_strides, batch, head, rows, sizes.queries, how)
        fixed = tl.sum(gradient.to(wide) * result.to(wide), 1)
    seconds = tl.zeros([how.ROWS, how.PADDED], wide)
    average_k = tl.zeros([how.ROWS, how.PADDED], wide)
    sums = tl.zeros([how.ROWS, how.PADDED], wide)
    walk = row_walk(seen, sizes, blocks, batch, head, rows, first, last, how)
    for stage in tl.static_range(3):
        for step in tl.range(walk[stage], walk[stage + 1]):
            at, kind = key_at(blocks, batch, head, rows, step, how)
            columns = at + tl.arange(0, how.COLUMNS)
            keys = load_tile(k, k_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            moves_k = load_tile(y, y_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            values = load_tile(v, v_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            moves_v = load_tile(z, z_strides, batch, key_head, at, how.COLUMNS, sizes.keys, how)
            products = product(queries, tl.trans(keys), how)
            logits, bent = bend(products, aligned, columns[None, :], slope, sizes, how)
            weights = tl.exp2(logits - level[:, None])
            if stage != 1:
                pairs = pairs_seen(
                    seen, sizes, blocks, batch, rows, columns, first, last, kind, how
                )
                weights = tl.where(pairs, weights, 0.0)
            plain = product(moves_q, tl.trans(keys), how)
            plain = (plain + product(queries, tl.trans(moves_k), how)) * sizes.scale
            pull = product(gradient, tl.trans(values), how) - offset[:, None]
            moved = plain
            if how.SOFTCAP:
                moved = plain * (1.0 - bent * bent)
            outer = product(gradient, tl.trans(moves_v), how)
            if how.CENTRED:
                outer = weights * ((moved - mean[:, None]) * pull + outer - fixed[:, None])
            else:
                share = weights * moved
                mean += tl.sum(share, 1)
                sums += product(operand(share, v, how), values, how)
                sums += product(operand(weights, z, how), moves_v, how)
                outer = weights * (moved * pull + outer)
            scores = weights * pull
            if how.SOFTCAP:
                bow = -2.0 / sizes.softcap * bent * (1.0 - bent * bent)
                outer = outer * (1.0 - bent * bent) + scores * plain * bow
                scores *= 1.0 - bent * bent
                weights *= 1.0 - bent * bent
            seconds += product(operand(outer, k, how), keys, how)
            seconds += product(operand(scores, y, how), moves_k, how)
            if not how.CENTRED:
                average_k += product(operand(weights, k, how), keys, how)
    if not how.CENTRED:
        outputs = load_rows(out, out_strides, batch, head, rows, sizes.queries, how)
        sums -= mean[:, None] * outputs
        store_rows(along_out, along_strides, batch, head, rows, sizes.queries, sums, how)
        store_numbers(along_lse, sizes, batch, head, rows, mean)
        fixed = tl.sum(gradient.to(wide) * sums, 1)
        firsts = load_rows(grad_q, grad_q_strides, batch, head, rows, sizes.queries, how)
        seconds = sizes.scale * (seconds - fixed[:, None] * average_k) - mean[:, None] * firsts
    else:
        seconds *= sizes.scale
    store_numbers(constant, sizes, batch, head, rows, fixed)
    store_rows(second_q, second_q_strides, batch, head, rows, sizes.queries, seconds, how)


@triton.jit
def double_backward_columns_kernel(
    q, k, v, x, y, z, lse, grad_out, delta, along_lse, constant, second_k, second_v,
    q_strides, k_strides, v_strides, x_strides, y_strides, z_strides, grad_out_strides,
    second_k_strides, second_v_strides, sizes, seen, blocks, how,
):  # fmt: skip
    """Write gK and gV of one tile of keys of one key head, summed over its query heads.

    Tiles are transposed: keys by queries.
    """
    key_heads = sizes.heads // sizes.ratio
    batch, key_head = tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    columns = tl.program_id(0) * how.COLUMNS + tl.arange(0, how.COLUMNS)
    keys = load_rows(k, k_strides, batch, key_head, columns, sizes.keys, how)
    moves_k = load_rows(y, y_strides, batch, key_head, columns, sizes.keys, how)
    values = load_rows(v, v_strides, batch, key_head, columns, sizes.keys, how)
    moves_v = load_rows(z, z_strides, batch, key_head, columns, sizes.keys, how)
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
                moves_q = load_tile(x, x_strides, batch, head, at, how.ROWS, sizes.queries, how)
                gradient = load_tile(
                    grad_out, grad_out_strides, batch, head, at, how.ROWS, sizes.queries, how
                )
                level = load_lse(lse, sizes, batch, head, rows)
                offset = load_numbers(delta, sizes, batch, head, rows)
                mean = load_numbers(along_lse, sizes, batch, head, rows)
                fixed = load_numbers(constant, sizes, batch, head, rows)
                aligned = load_aligned(seen, sizes, batch, rows[None, :], how)
                products = product(keys, tl.trans(queries), how)
                logits, bent = bend(products, aligned, columns[:, None], slope, sizes, how)
                weights = tl.exp2(logits - level[None, :])
                if stage != 1:
                    pairs = pairs_seen_by_keys(
                        seen, sizes, blocks, batch, rows, columns, above, below, kind, how
                    )
                    weights = tl.where(pairs, weights, 0.0)
                plain = product(keys, tl.trans(moves_q), how)
                plain = (plain + product(moves_k, tl.trans(queries), how)) * sizes.scale
                pull = product(values, tl.trans(gradient), how) - offset[None, :]
                moved = plain
                if how.SOFTCAP:
                    moved = plain * (1.0 - bent * bent)
                centred = weights * (moved - mean[None, :])
                sums_v += product(operand(centred, grad_out, how), gradient, how)
                outer = product(moves_v, tl.trans(gradient), how) - fixed[None, :]
                outer = centred * pull + weights * outer
                scores = weights * pull
                if how.SOFTCAP:
                    bow = -2.0 / sizes.softcap * bent * (1.0 - bent * bent)
                    outer = outer * (1.0 - bent * bent) + scores * plain * bow
                    scores *= 1.0 - bent * bent
                sums_k += product(operand(outer, q, how), queries, how)
                sums_k += product(operand(scores, x, how), moves_q, how)
    sums_k *= sizes.scale
    store_rows(second_k, second_k_strides, batch, key_head, columns, sizes.keys, sums_k, how)
    store_rows(second_v, second_v_strides, batch, key_head, columns, sizes.keys, sums_v, how)
