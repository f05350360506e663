"""What all tiled attention kernels share: loading, logits, and which pairs of a tile are seen.

A program owns a tile of queries (row kernels) or of keys (column kernels) and walks over tiles of
the other. Tiles in which every pair is seen are walked without masks; hidden ones not at all.
Logits are in units of `log 2`, so that `exp2` serves. Plain pointers with masks throughout: block
pointers are gone in Triton 3.9.
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """Numbers of one call.

    Attributes:
        queries: T.
        keys: S.
        heads: H, query heads.
        ratio: Query heads per key head.
        scale: Factor on products.
        softcap: Bound on scores, 0 for none.
    """

    queries: int
    keys: int
    heads: int
    ratio: int
    scale: float
    softcap: float


class How(NamedTuple):
    """What kernels are compiled for; every field a `tl.constexpr`.

    Attributes:
        WIDTH: K, the head width.
        PADDED: The next power of two from 16 on.
        WIDE: Whether 16-bit tiles are computed with in fp32 (the interpreter cannot multiply them).
        PRECISION: Of products of fp32: `ieee`, `tf32` or `tf32x3`.
        SOFTCAP: Whether scores are bounded.
        ALIBI: Whether there are slopes.
        SEGMENTS: Whether segments are compared.
        SPARSE: Whether a block-sparse mask lists the tiles.
        BLOCK_Q: Its block of queries.
        BLOCK_KV: Its block of keys.
        ROWS: Queries of a tile.
        COLUMNS: Keys of a tile.
        CENTRED: In the double backward, whether a pass before knew the row means.
    """

    WIDTH: Any
    PADDED: Any
    WIDE: Any
    PRECISION: Any
    SOFTCAP: Any
    ALIBI: Any
    SEGMENTS: Any
    SPARSE: Any
    BLOCK_Q: Any
    BLOCK_KV: Any
    ROWS: Any
    COLUMNS: Any
    CENTRED: Any


class Seen(NamedTuple):
    """Which pairs are seen, as `scoring.Scoring` says it; pointers, absent ones None.

    Attributes:
        left: Keys before the aligned one, where there are no ranges.
        right: Keys after it.
        first: (B, T) first key of each query.
        last: (B, T) one past its last key.
        above: (B, S) first query that may see each key.
        below: (B, S) one past its last query.
        query_segments: (B, T).
        key_segments: (B, S).
        aligned: (B, T) keys that queries are aligned with, where not `i + S - T`.
        slopes: (H,) of ALiBi, in units of log 2.
    """

    left: int
    right: int
    first: Any
    last: Any
    above: Any
    below: Any
    query_segments: Any
    key_segments: Any
    aligned: Any
    slopes: Any


class Blocks(NamedTuple):
    """Lists of the blocks that the blocks of one side see of the other, hidden ones last.

    Attributes:
        counts: (batches, heads, own blocks) int32, blocks that are not hidden.
        lists: (batches, heads, own blocks, other blocks) int32, their numbers.
        kinds: The same shape, what each is: whole or a place in `pairs`.
        pairs: (N, block of queries, block of keys) uint8.
        own: Length of `counts`' last dimension.
        other: Length of `lists`' last dimension.
        batch_step: 0 where all of the batch share the lists, else 1.
        head_step: 0 where all query heads share them, else 1.
        heads: Heads in the lists.
    """

    counts: Any
    lists: Any
    kinds: Any
    pairs: Any
    own: int
    other: int
    batch_step: int
    head_step: int
    heads: int


@triton.jit
def places_of(strides, batch, head, rows, how):
    """Return the offsets (n, PADDED) of rows of one head."""
    start = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return start + rows.to(tl.int64)[:, None] * strides[2] + tl.arange(0, how.PADDED)[None, :]


@triton.jit
def inside_of(rows, count, how):
    """Return which of (n, PADDED) elements exist."""
    return (rows < count)[:, None] & (tl.arange(0, how.PADDED) < how.WIDTH)[None, :]


@triton.jit
def load_rows(pointer, strides, batch, head, rows, count, how):
    """Load rows (n, PADDED) of one head, zeros outside."""
    places = places_of(strides, batch, head, rows, how)
    tile = tl.load(pointer + places, mask=inside_of(rows, count, how), other=0.0)
    if how.WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_tile(pointer, strides, batch, head, start, LENGTH: tl.constexpr, count, how):
    """Load rows `start` to `start + LENGTH` of one head (LENGTH, PADDED), zeros outside.

    For loops: what is added to the pointer is one number, and places inside a tile, which stay the
    same, fit 32 bits (`launch.rows_together`).
    """
    begin = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    begin += tl.cast(start, tl.int64) * strides[2]
    rows = tl.arange(0, LENGTH)
    places = rows[:, None] * strides[2] + tl.arange(0, how.PADDED)[None, :]
    inside = inside_of(rows, count - start, how)
    tile = tl.load(pointer + begin + places, mask=inside, other=0.0)
    if how.WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(pointer, strides, batch, head, rows, count, value, how):
    """Store rows of one head, rounded to nearest."""
    places = places_of(strides, batch, head, rows, how)
    value = rounded(value, pointer.dtype.element_ty)
    tl.store(pointer + places, value, mask=inside_of(rows, count, how))


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Convert to a dtype, to nearest even also in the interpreter, which truncates to bfloat16."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        up = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, up)
        return up.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505  (both branches must not be compiled)
        return value.to(DTYPE)


@triton.jit
def operand(value, pointer, how):
    """Round a tile to the dtype of a tensor, to be multiplied with tiles of it."""
    if how.WIDE:
        return rounded(value, pointer.dtype.element_ty).to(tl.float32)
    else:  # noqa: RET505
        return value.to(pointer.dtype.element_ty)


@triton.jit
def product(a, b, how):
    """Return the matrix product of two tiles, summed in fp32 at least."""
    return tl.dot(a, b, input_precision=how.PRECISION)


@triton.jit
def load_numbers(pointer, sizes, batch, head, rows):
    """Load one number per query of (B, H, T)."""
    start = (batch.to(tl.int64) * sizes.heads + head) * sizes.queries
    return tl.load(pointer + start + rows, mask=rows < sizes.queries, other=0.0)


@triton.jit
def store_numbers(pointer, sizes, batch, head, rows, value):
    """Store one number per query of (B, H, T)."""
    start = (batch.to(tl.int64) * sizes.heads + head) * sizes.queries
    tl.store(pointer + start + rows, value, mask=rows < sizes.queries)


@triton.jit
def load_lse(pointer, sizes, batch, head, rows):
    """Load log-sum-exps in units of log 2; 0 for queries that see nothing."""
    lse = load_numbers(pointer, sizes, batch, head, rows)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def load_slope(seen, head, how):
    """Load a head's ALiBi slope, in units of log 2."""
    if how.ALIBI:
        return tl.load(seen.slopes + head)
    else:  # noqa: RET505
        return 0.0


@triton.jit
def load_aligned(seen, sizes, batch, rows, how):
    """Return the keys that queries are aligned with; rows may be broadcast."""
    if how.ALIBI and seen.aligned is not None:
        place = batch.to(tl.int64) * sizes.queries + rows
        return tl.load(seen.aligned + place, mask=rows < sizes.queries, other=0)
    else:  # noqa: RET505
        return rows + (sizes.keys - sizes.queries)


@triton.jit
def key_range(seen, sizes, batch, rows):
    """Return first and one past last key of each query; nothing for rows past the end."""
    inside = rows < sizes.queries
    if seen.first is not None:
        place = batch.to(tl.int64) * sizes.queries + rows
        first = tl.load(seen.first + place, mask=inside, other=0)
        last = tl.load(seen.last + place, mask=inside, other=0)
    else:
        at = rows + (sizes.keys - sizes.queries)
        first = tl.minimum(tl.maximum(at - seen.left, 0), sizes.keys)
        last = tl.minimum(tl.maximum(at + seen.right + 1, 0), sizes.keys)
    return tl.where(inside, first, sizes.keys), tl.where(inside, last, 0)


@triton.jit
def query_range(seen, sizes, batch, columns):
    """Return first and one past last query that may see each key; nothing for keys past the
    end.
    """
    inside = columns < sizes.keys
    if seen.above is not None:
        place = batch.to(tl.int64) * sizes.keys + columns
        above = tl.load(seen.above + place, mask=inside, other=0)
        below = tl.load(seen.below + place, mask=inside, other=0)
    else:
        at = columns - (sizes.keys - sizes.queries)
        above = tl.minimum(tl.maximum(at - seen.right, 0), sizes.queries)
        below = tl.minimum(tl.maximum(at + seen.left + 1, 0), sizes.queries)
    return tl.where(inside, above, sizes.queries), tl.where(inside, below, 0)


@triton.jit
def borders(first, last, inside, count, STEP: tl.constexpr, PLAIN: tl.constexpr):
    """Return the borders of a walk in tiles: begin, begin and end of the tiles in which all pairs
    are seen, end.

    Args:
        first: First position that each of the own positions meets.
        last: One past the last.
        inside: Own positions that exist.
        count: Number of positions walked over.
        STEP: Tile length.
        PLAIN: Whether ranges alone decide; if not, no tile is taken as seen in full.
    """
    begin, end = tl.min(first, 0) // STEP, (tl.max(last, 0) + STEP - 1) // STEP
    end = tl.maximum(begin, end)
    full_begin, full_end = end, end
    if PLAIN:
        full_begin = (tl.max(tl.where(inside, first, 0), 0) + STEP - 1) // STEP
        full_end = tl.min(tl.where(inside, last, count), 0) // STEP
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def row_walk(seen, sizes, blocks, batch, head, rows, first, last, how):
    """Return the borders of a query tile's walk over tiles of keys."""
    if how.SPARSE:
        begin = tl.program_id(0) * 0
        count = listed_count(blocks, batch, head, tl.min(rows, 0) // how.BLOCK_Q)
        return begin, begin, begin, count * (how.BLOCK_KV // how.COLUMNS)
    else:  # noqa: RET505
        plain: tl.constexpr = not how.SEGMENTS
        return borders(first, last, rows < sizes.queries, sizes.keys, how.COLUMNS, plain)


@triton.jit
def column_walk(seen, sizes, blocks, batch, head, columns, above, below, how):
    """Return the borders of a key tile's walk over tiles of queries."""
    if how.SPARSE:
        begin = tl.program_id(0) * 0
        count = listed_count(blocks, batch, head, tl.min(columns, 0) // how.BLOCK_KV)
        return begin, begin, begin, count * (how.BLOCK_Q // how.ROWS)
    else:  # noqa: RET505
        # Stored ranges of keys are transposed only roughly: then every tile is masked.
        plain: tl.constexpr = not how.SEGMENTS and seen.first is None
        return borders(above, below, columns < sizes.keys, sizes.queries, how.ROWS, plain)


@triton.jit
def list_row(blocks, batch, head, own):
    """Return which list of blocks belongs to a block of the own side."""
    row = batch * blocks.batch_step * blocks.heads + head * blocks.head_step
    return row * blocks.own + own


@triton.jit
def listed_count(blocks, batch, head, own):
    """Return the number of blocks that a block of the own side sees."""
    return tl.load(blocks.counts + list_row(blocks, batch, head, own))


@triton.jit
def listed(blocks, batch, head, own, step, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return where a step of a walk over listed blocks begins, and the block's kind.

    Args:
        own: Block of the own side.
        step: Number of the tile among those of the listed blocks.
        BLOCK: Block length on the other side.
        STEP: Tile length, a divisor of `BLOCK`.
    """
    row = list_row(blocks, batch, head, own).to(tl.int64) * blocks.other
    block = step // (BLOCK // STEP)
    place = row + block
    # Not by %: in the interpreter `step` is a plain number, which has none with a constant.
    start = tl.load(blocks.lists + place) * BLOCK + (step - block * (BLOCK // STEP)) * STEP
    return start, tl.load(blocks.kinds + place)


@triton.jit
def key_at(blocks, batch, head, rows, step, how):
    """Return the first key of one step of a query tile's walk, and the kind of its block."""
    if how.SPARSE:
        own = tl.min(rows, 0) // how.BLOCK_Q
        start, kind = listed(blocks, batch, head, own, step, how.BLOCK_KV, how.COLUMNS)
        return start, kind
    else:  # noqa: RET505
        return step * how.COLUMNS, 0


@triton.jit
def query_at(blocks, batch, head, columns, step, how):
    """Return the first query of one step of a key tile's walk, and the kind of its block."""
    if how.SPARSE:
        own = tl.min(columns, 0) // how.BLOCK_KV
        start, kind = listed(blocks, batch, head, own, step, how.BLOCK_Q, how.ROWS)
        return start, kind
    else:  # noqa: RET505
        return step * how.ROWS, 0


@triton.jit
def pairs_seen(seen, sizes, blocks, batch, rows, columns, first, last, kind, how):
    """Return which pairs of a tile (queries by keys) are seen.

    Args:
        first: First key of each query.
        last: One past its last key.
    """
    rows, columns = rows[:, None], columns[None, :]
    pairs = (columns >= first[:, None]) & (columns < last[:, None])
    return pairs_kept(pairs, seen, sizes, blocks, batch, rows, columns, kind, how)


@triton.jit
def pairs_seen_by_keys(seen, sizes, blocks, batch, rows, columns, above, below, kind, how):
    """Return which pairs of a transposed tile (keys by queries) are seen.

    Args:
        above: First query that may see each key.
        below: One past the last.
    """
    if seen.first is None:
        # Numbers of keys, the own side, cost a thread far fewer registers than those of queries.
        pairs = (rows[None, :] >= above[:, None]) & (rows[None, :] < below[:, None])
    else:
        first, last = key_range(seen, sizes, batch, rows)
        pairs = (columns[:, None] >= first[None, :]) & (columns[:, None] < last[None, :])
    rows, columns = rows[None, :], columns[:, None]
    return pairs_kept(pairs, seen, sizes, blocks, batch, rows, columns, kind, how)


@triton.jit
def pairs_kept(pairs, seen, sizes, blocks, batch, rows, columns, kind, how):
    """Return what segments and block-sparse masks leave of pairs; rows and columns broadcast."""
    if how.SEGMENTS:
        row_place = batch.to(tl.int64) * sizes.queries + rows
        column_place = batch.to(tl.int64) * sizes.keys + columns
        mine = tl.load(seen.query_segments + row_place, mask=rows < sizes.queries, other=-1)
        theirs = tl.load(seen.key_segments + column_place, mask=columns < sizes.keys, other=-2)
        pairs = pairs & (mine == theirs)
    if how.SPARSE:
        # A block that is seen whole is number -1: its places are negative, and not looked up.
        start = kind.to(tl.int64) * (how.BLOCK_Q * how.BLOCK_KV)
        places = start + (rows % how.BLOCK_Q) * how.BLOCK_KV + columns % how.BLOCK_KV
        pairs = pairs & (tl.load(blocks.pairs + places, mask=places >= 0, other=1) != 0)
    return pairs


@triton.jit
def tanh(x):
    """Hyperbolic tangent without a device library; a series where 1 - exp would cancel."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    y = x * x
    series = -17.0 / 315 + y * (62.0 / 2835 - y * (1382.0 / 155925))
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * series)))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def bend(products, aligned, columns, slope, sizes, how):
    """Return logits in units of log 2, and the tanh of the soft cap, which means nothing without
    one.
    """
    if how.SOFTCAP:
        bent = tanh(products * (sizes.scale / sizes.softcap))
        logits = bent * (sizes.softcap * LOG2E)
    else:
        bent = products
        logits = products * (sizes.scale * LOG2E)
    if how.ALIBI:
        logits -= slope * tl.abs(aligned - columns).to(tl.float32)
    return logits, bent
