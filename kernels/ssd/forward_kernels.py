"""Triton kernels of state-space duality, forward: a program works on a chunk or a tile of one.

A chunk table (see `chunks`) says which rows a chunk has, so documents need no masks. Decays are
fp32 differences of running sums inside a chunk, masked before they are exponentiated. Tensors over
positions are addressed by row (position of the batch laid end to end) and a row stride, so slices
of a wider tensor need no copy. No atomics: every number is written by one program.

    running sums -> scores C B^T (once per group) -> what chunks add -> carry -> outputs

Dao and Gu 2024, arXiv 2405.21060, section 6.
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportArgumentType=false

import triton
import triton.language as tl

from interlace.kernels.update.gpu import store_nearest

# c chunk, h head, g group, n rows of the chunk; i, j tiles of a chunk, i later than or equal to j
# Q positions of a chunk, `tile` of a tile, `wide` head width of a tile, `states` N rounded up


@triton.jit
def rows_of(chunk_start, chunk_length, c):
    """Return first row (int64) and number of rows of a chunk."""
    return tl.load(chunk_start + c).to(tl.int64), tl.load(chunk_length + c)


@triton.jit
def load_rows(pointer, first, at, row_stride, column, columns, n, width):
    """Load rows `at` of a chunk at columns `column + columns`; zero outside."""
    mask = (at < n)[:, None] & (columns < width)[None, :]
    place = (first + at)[:, None] * row_stride + (column + columns)[None, :]
    return tl.load(pointer + place, mask=mask, other=0.0)


@triton.jit
def load_state(pointer, c, h, heads, across, width, along, state_width):
    """Load a tile (across, along) of the state of a chunk and head; zero outside."""
    base = (c.to(tl.int64) * heads + h) * width * state_width
    mask = (across < width)[:, None] & (along < state_width)[None, :]
    return tl.load(
        pointer + base + across[:, None] * state_width + along[None, :], mask=mask, other=0.0
    )


@triton.jit
def running_sums(
    dt, A, chunk_start, chunk_length, running,
    dt_stride, rows, heads, Q: tl.constexpr,
):  # fmt: skip
    """Write the sums of dt A over a chunk, each including its own position, as (2, H, rows): the
    number in fp32, and what it lacks. Differences of large sums are small numbers, and exact to
    their own last bit that way.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    first, n = rows_of(chunk_start, chunk_length, c)
    at = tl.arange(0, Q)
    steps = tl.load(dt + (first + at) * dt_stride + h, mask=at < n, other=0.0).to(tl.float32)
    sums = tl.cumsum(steps.to(tl.float64) * tl.load(A + h).to(tl.float64), 0)
    high = sums.to(tl.float32)
    place = running + h.to(tl.int64) * rows + first + at
    tl.store(place, high, mask=at < n)
    tl.store(
        place + heads.to(tl.int64) * rows, (sums - high.to(tl.float64)).to(tl.float32), mask=at < n
    )


@triton.jit
def decay_to_end(sums, side, at, n):
    """Return the decay from positions of a chunk to its end; zero behind it."""
    high = tl.load(sums + n - 1) - tl.load(sums + at, mask=at < n, other=0.0)
    low = tl.load(sums + side + n - 1) - tl.load(sums + side + at, mask=at < n, other=0.0)
    return tl.exp(tl.where(at < n, high + low, float("-inf")))


@triton.jit
def decay_tile(sums, side, t, s, n, transposed: tl.constexpr):
    """Return decays from positions s to t as (t, s), or transposed; zero for the future."""
    late = tl.load(sums + t, mask=t < n, other=0.0)
    late_rest = tl.load(sums + side + t, mask=t < n, other=0.0)
    early = tl.load(sums + s, mask=s < n, other=0.0)
    early_rest = tl.load(sums + side + s, mask=s < n, other=0.0)
    if transposed:
        seen = (s[:, None] <= t[None, :]) & (t < n)[None, :]
        difference = late[None, :] - early[:, None] + (late_rest[None, :] - early_rest[:, None])
    else:
        seen = (s[None, :] <= t[:, None]) & (t < n)[:, None]
        difference = late[:, None] - early[None, :] + (late_rest[:, None] - early_rest[None, :])
    # Masked before exp: the future's differences are positive.
    return tl.exp(tl.where(seen, difference, float("-inf")))


@triton.jit
def score_tiles(
    B, C, chunk_start, chunk_length, scores,
    b_stride, c_stride, groups, state_width,
    Q: tl.constexpr, tile: tl.constexpr, states: tl.constexpr,
    product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write C_t B_s of all tiles up to the diagonal, as (chunks, G, Q, Q)."""
    tiles: tl.constexpr = Q // tile
    c, g = tl.program_id(0) // (tiles * tiles), tl.program_id(1)
    i, j = tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    first, n = rows_of(chunk_start, chunk_length, c)
    if j > i or i * tile >= n:
        return
    t, s, columns = (
        i * tile + tl.arange(0, tile),
        j * tile + tl.arange(0, tile),
        tl.arange(0, states),
    )
    reads = load_rows(C, first, t, c_stride, g * state_width, columns, n, state_width)
    writes = load_rows(B, first, s, b_stride, g * state_width, columns, n, state_width)
    found = tl.dot(reads.to(product), tl.trans(writes.to(product)), input_precision=precision)
    base = (c.to(tl.int64) * groups + g) * Q * Q
    tl.store(scores + base + t[:, None] * Q + s[None, :], found)


@triton.jit
def state_sums(
    values, keys, dt, running, chunk_start, chunk_length, out,
    value_stride, key_stride, dt_stride, rows, heads, shared, width, state_width,
    to_end: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr, states: tl.constexpr,
    product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write sums over a chunk of weight * value (outer) key, as (chunks, H, P, N).

    Weighted by dt and the decay to the end of the chunk (what a chunk adds to the state), or by the
    decay from its start (what the gradient of its outputs adds to that of the state before it).
    """
    c, h = tl.program_id(0), tl.program_id(1)
    first, n = rows_of(chunk_start, chunk_length, c)
    across, along = tl.program_id(2) * wide + tl.arange(0, wide), tl.arange(0, states)
    sums = running + h.to(tl.int64) * rows + first
    side = heads.to(tl.int64) * rows
    total = tl.zeros((wide, states), dtype=tl.float32)
    for begin in range(0, n, tile):
        at = begin + tl.arange(0, tile)
        if to_end:
            steps = tl.load(dt + (first + at) * dt_stride + h, mask=at < n, other=0.0)
            weight = steps.to(tl.float32) * decay_to_end(sums, side, at, n)
        else:
            weight = tl.exp(tl.load(sums + at, mask=at < n, other=0.0))
        value = load_rows(values, first, at, value_stride, h * width, across, n, width)
        key = load_rows(
            keys, first, at, key_stride, h // shared * state_width, along, n, state_width
        )
        weighted = (value.to(tl.float32) * weight[:, None]).to(product)
        total += tl.dot(tl.trans(weighted), key.to(product), input_precision=precision)
    base = (c.to(tl.int64) * heads + h) * width * state_width
    mask = (across < width)[:, None] & (along < state_width)[None, :]
    tl.store(out + base + across[:, None] * state_width + along[None, :], total, mask=mask)


@triton.jit
def carry_states(
    states, running, chunk_start, chunk_length, first_chunk, chunk_count,
    source, source_row, target, target_row, rows, heads, size,
    has_source: tl.constexpr, backwards: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of a document and replace what each adds by the state that enters it.

    The walk begins with `source` (batch, H, P N) or zeros, and what is left at its end goes to
    `target`; -1 as row means that the document has none. Backwards it carries gradients, whose
    decays are the same.
    """
    document, h = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * block + tl.arange(0, block)
    first, count = tl.load(first_chunk + document), tl.load(chunk_count + document)
    state = tl.zeros((block,), dtype=tl.float32)
    if has_source:
        row = tl.load(source_row + document).to(tl.int64)
        there = tl.where(row >= 0, size, 0)
        state += tl.load(source + (row * heads + h) * size + at, mask=at < there, other=0.0)
    for step in range(count):
        c = first + step
        if backwards:
            c = first + count - 1 - step
        start, n = rows_of(chunk_start, chunk_length, c)
        decay = tl.exp(tl.load(running + h.to(tl.int64) * rows + start + n - 1))
        place = states + (c.to(tl.int64) * heads + h) * size + at
        added = tl.load(place, mask=at < size, other=0.0)
        tl.store(place, state, mask=at < size)
        state = decay * state + added
    row = tl.load(target_row + document).to(tl.int64)
    there = tl.where(row >= 0, size, 0)
    tl.store(target + (row * heads + h) * size + at, state, mask=at < there)


@triton.jit
def outputs(
    x, dt, C, D, running, scores, states, chunk_start, chunk_length, y,
    x_stride, dt_stride, c_stride, rows, heads, shared, width, state_width,
    has_skip: tl.constexpr, Q: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr,
    all_states: tl.constexpr, product: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write the outputs of one tile: what it reads of the entering state and of its own chunk."""
    tiles: tl.constexpr = Q // tile
    c, i, h = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first, n = rows_of(chunk_start, chunk_length, c)
    if i * tile >= n:
        return
    g, groups = h // shared, heads // shared
    t, inner = i * tile + tl.arange(0, tile), tl.arange(0, tile)
    across, along = tl.program_id(2) * wide + tl.arange(0, wide), tl.arange(0, all_states)
    sums = running + h.to(tl.int64) * rows + first
    side = heads.to(tl.int64) * rows
    tile_scores = scores + (c.to(tl.int64) * groups + g) * Q * Q

    reads = load_rows(C, first, t, c_stride, g * state_width, along, n, state_width)
    state = load_state(states, c, h, heads, across, width, along, state_width)
    total = tl.dot(reads.to(product), tl.trans(state.to(product)), input_precision=precision)
    total *= tl.exp(tl.load(sums + t, mask=t < n, other=0.0))[:, None]
    for j in range(i + 1):
        s = j * tile + inner
        steps = tl.load(dt + (first + s) * dt_stride + h, mask=s < n, other=0.0).to(tl.float32)
        found = tl.load(tile_scores + t[:, None] * Q + s[None, :])
        weight = found * decay_tile(sums, side, t, s, n, False) * steps[None, :]
        value = load_rows(x, first, s, x_stride, h * width, across, n, width)
        total += tl.dot(weight.to(product), value.to(product), input_precision=precision)
    if has_skip:
        value = load_rows(x, first, t, x_stride, h * width, across, n, width)
        skip = tl.load(D + h * width + across, mask=across < width, other=0.0)
        total += skip[None, :] * value.to(tl.float32)
    place = ((first + t)[:, None] * heads + h) * width + across[None, :]
    store_nearest(y + place, total, (t < n)[:, None] & (across < width)[None, :])
