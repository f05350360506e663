"""Triton kernels of state-space duality, backward: no atomics, one writer for every number.

The states are computed again, not kept: in fp32 they are larger than the inputs. W is the matrix
that a chunk multiplies its inputs by, dW its gradient; the product of the two, number by number, is
what the gradients of the decays are made of. Sums over the heads of a group are taken inside a
program, in splits of heads that are added up afterwards in a fixed order.

    states again -> states' gradients -> carry backwards -> x -> scores -> B, C -> dt, A
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportArgumentType=false

import triton
import triton.language as tl

from interlace.kernels.ssd.forward_kernels import (
    decay_tile,
    decay_to_end,
    load_rows,
    load_state,
    rows_of,
)
from interlace.kernels.update.gpu import store_nearest


@triton.jit
def input_gradients(
    x, dt, B, D, dy, running, scores, state_gradients, chunk_start, chunk_length, dx, skip_parts,
    x_stride, dt_stride, b_stride, rows, heads, shared, width, state_width,
    has_skip: tl.constexpr, Q: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr,
    all_states: tl.constexpr, product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x of one tile, and this tile's part of the gradient of D."""
    tiles: tl.constexpr = Q // tile
    c, j, h = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first, n = rows_of(chunk_start, chunk_length, c)
    if j * tile >= n:
        return
    g, groups = h // shared, heads // shared
    s, inner = j * tile + tl.arange(0, tile), tl.arange(0, tile)
    across, along = tl.program_id(2) * wide + tl.arange(0, wide), tl.arange(0, all_states)
    sums = running + h.to(tl.int64) * rows + first
    side = heads.to(tl.int64) * rows
    tile_scores = scores + (c.to(tl.int64) * groups + g) * Q * Q

    writes = load_rows(B, first, s, b_stride, g * state_width, along, n, state_width)
    state = load_state(state_gradients, c, h, heads, across, width, along, state_width)
    total = tl.dot(writes.to(product), tl.trans(state.to(product)), input_precision=precision)
    total *= decay_to_end(sums, side, s, n)[:, None]
    for i in range(j, tl.cdiv(n, tile)):
        t = i * tile + inner
        found = tl.load(tile_scores + t[None, :] * Q + s[:, None])
        weight = found * decay_tile(sums, side, t, s, n, True)
        gradient = load_rows(dy, first, t, heads * width, h * width, across, n, width)
        total += tl.dot(weight.to(product), gradient.to(product), input_precision=precision)
    steps = tl.load(dt + (first + s) * dt_stride + h, mask=s < n, other=0.0).to(tl.float32)
    total *= steps[:, None]
    if has_skip:
        gradient = load_rows(dy, first, s, heads * width, h * width, across, n, width)
        value = load_rows(x, first, s, x_stride, h * width, across, n, width)
        skip = tl.load(D + h * width + across, mask=across < width, other=0.0)
        total += skip[None, :] * gradient.to(tl.float32)
        part = tl.sum(gradient.to(tl.float32) * value.to(tl.float32), 0)
        place = (tl.program_id(0).to(tl.int64) * heads + h) * width + across
        tl.store(skip_parts + place, part, mask=across < width)
    place = ((first + s)[:, None] * heads + h) * width + across[None, :]
    store_nearest(dx + place, total, (s < n)[:, None] & (across < width)[None, :])


@triton.jit
def score_gradients(
    x, dt, dy, running, scores, chunk_start, chunk_length, out, row_sums, column_sums,
    x_stride, dt_stride, rows, heads, shared, width, chunks, split_heads,
    Q: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr,
    product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of C B^T, summed over the heads of a split; and, per head, the
    sums of W dW along columns (without their factor dt) and along rows. On the diagonal, in place
    of the latter, what passes position u on its way from s < u to t >= u.
    """
    tiles: tl.constexpr = Q // tile
    c, g, split = tl.program_id(0) // (tiles * tiles), tl.program_id(1), tl.program_id(2)
    i, j = tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    first, n = rows_of(chunk_start, chunk_length, c)
    if j > i or i * tile >= n:
        return
    t, s = i * tile + tl.arange(0, tile), j * tile + tl.arange(0, tile)
    groups = heads // shared
    place = (c.to(tl.int64) * groups + g) * Q * Q + t[:, None] * Q + s[None, :]
    found = tl.load(scores + place)
    total = tl.zeros((tile, tile), dtype=tl.float32)
    side = heads.to(tl.int64) * rows
    for member in range(split * split_heads, tl.minimum((split + 1) * split_heads, shared)):
        h = g * shared + member
        weight = tl.zeros((tile, tile), dtype=tl.float32)
        for begin in range(0, width, wide):
            across = begin + tl.arange(0, wide)
            gradient = load_rows(dy, first, t, heads * width, h * width, across, n, width)
            value = load_rows(x, first, s, x_stride, h * width, across, n, width)
            weight += tl.dot(
                gradient.to(product), tl.trans(value.to(product)), input_precision=precision
            )
        head_rows = h.to(tl.int64) * rows + first
        weight *= decay_tile(running + head_rows, side, t, s, n, False)
        steps = tl.load(dt + (first + s) * dt_stride + h, mask=s < n, other=0.0).to(tl.float32)
        scaled = weight * steps[None, :]
        total += scaled
        scaled *= found
        if i == j:
            scaled = tl.where(s[None, :] < t[:, None], tl.cumsum(scaled, 0, reverse=True), 0.0)
        tl.store(row_sums + j * side + head_rows + t, tl.sum(scaled, 1), mask=t < n)
        tl.store(column_sums + i * side + head_rows + s, tl.sum(weight * found, 0), mask=s < n)
    tl.store(out + split.to(tl.int64) * chunks * groups * Q * Q + place, total)


@triton.jit
def key_gradients(
    values, keys, others, dt, running, states, score_gradient, chunk_start, chunk_length,
    out, state_sums, value_stride, key_stride, other_stride, dt_stride,
    rows, heads, shared, width, state_width, chunks, split_heads,
    of_writes: tl.constexpr, Q: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr,
    all_states: tl.constexpr, product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of B (of_writes) or C, summed over the heads of a split.

    For B `values` is x, `states` the gradient of the state that leaves the chunk, `others` C; for C
    they are dy, the state that enters, and B. Per head also written: the product of the part that
    goes through the state with the key itself, which is a gradient of the decays.
    """
    tiles: tl.constexpr = Q // tile
    c, own, g = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    split = tl.program_id(2)
    first, n = rows_of(chunk_start, chunk_length, c)
    if own * tile >= n:
        return
    groups = heads // shared
    inner, along = tl.arange(0, tile), tl.arange(0, all_states)
    at = own * tile + inner
    key = load_rows(keys, first, at, key_stride, g * state_width, along, n, state_width)
    total = tl.zeros((tile, all_states), dtype=tl.float32)
    for member in range(split * split_heads, tl.minimum((split + 1) * split_heads, shared)):
        h = g * shared + member
        part = tl.zeros((tile, all_states), dtype=tl.float32)
        for begin in range(0, width, wide):
            across = begin + tl.arange(0, wide)
            value = load_rows(values, first, at, value_stride, h * width, across, n, width)
            state = load_state(states, c, h, heads, across, width, along, state_width)
            part += tl.dot(value.to(product), state.to(product), input_precision=precision)
        sums = running + h.to(tl.int64) * rows + first
        if of_writes:
            part *= decay_to_end(sums, heads.to(tl.int64) * rows, at, n)[:, None]
        else:
            part *= tl.exp(tl.load(sums + at, mask=at < n, other=0.0))[:, None]
        place = h.to(tl.int64) * rows + first + at
        tl.store(state_sums + place, tl.sum(part * key.to(tl.float32), 1), mask=at < n)
        if of_writes:
            steps = tl.load(dt + (first + at) * dt_stride + h, mask=at < n, other=0.0)
            part *= steps.to(tl.float32)[:, None]
        total += part
    base = ((split.to(tl.int64) * chunks + c) * groups + g) * Q * Q
    low, high = 0, own + 1
    if of_writes:
        low, high = own, tl.cdiv(n, tile)
    for k in range(low, high):
        theirs = k * tile + inner
        if of_writes:
            weight = tl.load(score_gradient + base + theirs[None, :] * Q + at[:, None])
        else:
            weight = tl.load(score_gradient + base + at[:, None] * Q + theirs[None, :])
        other = load_rows(
            others, first, theirs, other_stride, g * state_width, along, n, state_width
        )
        total += tl.dot(weight.to(product), other.to(product), input_precision=precision)
    place = (split.to(tl.int64) * rows + first + at)[:, None] * groups + g
    mask = (at < n)[:, None] & (along < state_width)[None, :]
    tl.store(out + place * state_width + along[None, :], total, mask=mask)


@triton.jit
def sums_from(values, k):
    """Return the sum of (tiles, tile) values from each position to the end."""
    later = tl.where(k[None, :] > k[:, None], tl.sum(values, 1)[None, :], 0.0)
    return tl.cumsum(values, 1, reverse=True) + tl.sum(later, 1)[:, None]


@triton.jit
def sums_up_to(values, k):
    """Return the sum of (tiles, tile) values from the beginning to each position."""
    earlier = tl.where(k[None, :] < k[:, None], tl.sum(values, 1)[None, :], 0.0)
    return tl.cumsum(values, 1) + tl.sum(earlier, 1)[:, None]


@triton.jit
def step_gradients(
    dt, A, running, states, state_gradients, row_sums, column_sums, read_sums, write_sums,
    chunk_start, chunk_length, d_dt, rate_parts,
    dt_stride, rows, heads, width, state_width,
    Q: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr, all_states: tl.constexpr,
):  # fmt: skip
    """Write the gradient of dt of a chunk and head, and this chunk's part of the gradient of A.

    A decay a_u = dt_u A shrinks every contribution that passes it: from s < u to t >= u inside the
    chunk, from the state before it to t >= u, from s < u to the state behind it, and from state to
    state. Contributions are only added: as a difference of sums over all t and all s, most of it
    would cancel, and what large steps shrink to nothing would drown in rounding.
    """
    tiles: tl.constexpr = Q // tile
    c, h = tl.program_id(0), tl.program_id(1)
    first, n = rows_of(chunk_start, chunk_length, c)
    k, inner, along = tl.arange(0, tiles), tl.arange(0, tile), tl.arange(0, all_states)
    at = k[:, None] * tile + inner[None, :]
    base = h.to(tl.int64) * rows + first
    side = heads.to(tl.int64) * rows
    here, before = at < n, (at > 0) & (at < n)
    steps = tl.load(dt + (first + at) * dt_stride + h, mask=here, other=0.0).to(tl.float32)
    last_steps = tl.load(dt + (first + at - 1) * dt_stride + h, mask=before, other=0.0)
    last_steps = last_steps.to(tl.float32)

    # Inside a tile, and from tile j to a later one: past what is left of j, past whole tiles, and
    # past the beginning of the later one.
    own = k[:, None] * side + base + at
    passing = tl.load(row_sums + own, mask=here, other=0.0)
    direct = tl.load(column_sums + own, mask=here, other=0.0)
    for j in range(tl.cdiv(n, tile)):
        arriving = tl.load(row_sums + j * side + base + at, mask=here & (k > j)[:, None], other=0.0)
        behind = tl.where(k[None, :] > k[:, None], tl.sum(arriving, 1)[None, :], 0.0)
        passing += tl.where(k > j, tl.sum(behind, 1), 0.0)[:, None]
        passing += tl.cumsum(arriving, 1, reverse=True)
        place = column_sums + j * side + base + at
        direct += tl.load(place, mask=here & (k < j)[:, None], other=0.0)
        leaving = tl.load(place - 1, mask=here & (k < j)[:, None] & (inner > 0)[None, :], other=0.0)
        passing += tl.cumsum(leaving * last_steps, 1)

    # Through the state before the chunk, the state behind it, and from one to the other.
    passing += sums_from(tl.load(read_sums + base + at, mask=here, other=0.0), k)
    written = tl.load(write_sums + base + at - 1, mask=before, other=0.0) * last_steps
    passing += sums_up_to(written, k)
    product = tl.zeros((wide, all_states), dtype=tl.float32)
    for begin in range(0, width, wide):
        across = begin + tl.arange(0, wide)
        state = load_state(states, c, h, heads, across, width, along, state_width)
        product += state * load_state(
            state_gradients, c, h, heads, across, width, along, state_width
        )
    passing += tl.exp(tl.load(running + base + n - 1)) * tl.sum(product)

    direct += tl.load(write_sums + base + at, mask=here, other=0.0)
    gradient = direct + tl.load(A + h) * passing
    tl.store(d_dt + (first + at) * heads + h, gradient, mask=here)
    part = tl.sum(tl.where(here, passing * steps, 0.0))
    tl.store(rate_parts + c.to(tl.int64) * heads + h, part)
