"""One-pass updates and sums on a GPU (Triton): the arithmetic of `cpu.py`, in the same order.

Multiplications and additions are not contracted and division and square root are correctly
rounded, so that a subgroup's numbers do not depend on where it is updated. Without a GPU the
kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which the tests use.
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportArgumentType=false

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from interlace.kernels.update.rules import UpdateRule
from interlace.kernels.update.slab import Slab, Step, rounding_keys

BLOCK = 1024

TURNS = 16
"""Blocks that one program of `squares` adds up."""

COLUMNS = tl.constexpr(8)
"""Entries of a row of the table of many slabs."""

PLAIN = ["count", "position", "key1", "key2"]
"""Arguments that change from call to call: a kernel of its own for multiples of 16, or for 1, would
be compiled in the middle of a run.
"""


@triton.jit
def noise(position, key):
    """Return 32 well-mixed bits for a position (finaliser of MurmurHash3, Appleby 2011)."""
    x = position ^ key
    x ^= x >> 16
    x = (x * 0x85EBCA6B).to(tl.uint32)
    x ^= x >> 13
    x = (x * 0xC2B2AE35).to(tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def store_rounded(pointer, value, random_bits, mask):
    """Store float32, stochastically rounded where the target is bfloat16."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + (random_bits & 0xFFFF), bits)
        tl.store(pointer, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def store_nearest(pointer, value, mask):
    """Store float32, rounded to nearest even where the target is bfloat16."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        up = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, up)
        tl.store(pointer, up.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def load_master(master, remainder, at, mask, split: tl.constexpr):
    """Load a master, whole or split."""
    if split:
        high = tl.load(master + at, mask=mask).to(tl.uint16, bitcast=True).to(tl.uint32)
        low = tl.load(remainder + at, mask=mask).to(tl.int32).to(tl.uint32, bitcast=True)
        return ((high << 16) + low).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  (both branches must not be compiled)
        return tl.load(master + at, mask=mask)


@triton.jit
def store_master(master, remainder, at, value, mask, split: tl.constexpr):
    """Store a master, whole or split."""
    if split:
        bits = value.to(tl.uint32, bitcast=True)
        high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        low = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
        tl.store(master + at, high, mask=mask)
        tl.store(remainder + at, low, mask=mask)
    else:
        tl.store(master + at, value, mask=mask)


@triton.jit
def entry(table, column: tl.constexpr, like):
    """Return an entry of this program's row, as a pointer like another."""
    return tl.load(table + tl.program_id(0).to(tl.int64) * COLUMNS + column).to(like.dtype)


@triton.jit
def adamw_block(
    gradient, master, first, second, weight, remainder, at, mask, scale,
    keep, beta1, rest1, beta2, rest2, root, eps, size, position, key1, key2,
    split: tl.constexpr, writes: tl.constexpr,
):  # fmt: skip
    """Update the elements of one block; see `AdamW.scalars`."""
    g = tl.load(gradient + at, mask=mask).to(tl.float32) * scale
    m = beta1 * tl.load(first + at, mask=mask).to(tl.float32) + rest1 * g
    v = beta2 * tl.load(second + at, mask=mask).to(tl.float32) + rest2 * (g * g)
    w = load_master(master, remainder, at, mask, split) * keep
    w -= size * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    place = at.to(tl.uint32) + position.to(tl.uint32)
    store_rounded(first + at, m, noise(place, key1.to(tl.uint32)), mask)
    store_rounded(second + at, v, noise(place, key2.to(tl.uint32)), mask)
    store_master(master, remainder, at, w, mask, split)
    if writes:
        store_nearest(weight + at, w, mask)


@triton.jit(do_not_specialize=PLAIN)
def adamw(
    gradient, master, first, second, weight, remainder, table, count, scale,
    keep, beta1, rest1, beta2, rest2, root, eps, size, position, key1, key2,
    split: tl.constexpr, writes: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Update one block of one slab, or of those of a table; see `rows_of`."""
    start = tl.program_id(0).to(tl.int64) * block
    if many:
        start *= 0
        gradient, master = entry(table, 0, gradient), entry(table, 1, master)
        weight, remainder = entry(table, 2, weight), entry(table, 3, remainder)
        count, position = entry(table, 4, start), entry(table, 5, start)
        first, second = entry(table, 6, first), entry(table, 7, second)
    at = start + tl.arange(0, block)
    # Whole blocks go without a mask, so that several elements move in one instruction.
    if start + block <= count:
        adamw_block(
            gradient, master, first, second, weight, remainder, at, None, scale,
            keep, beta1, rest1, beta2, rest2, root, eps, size, position, key1, key2, split, writes,
        )  # fmt: skip
    else:
        adamw_block(
            gradient, master, first, second, weight, remainder, at, at < count, scale,
            keep, beta1, rest1, beta2, rest2, root, eps, size, position, key1, key2, split, writes,
        )  # fmt: skip


@triton.jit
def sgd_block(
    gradient, master, buffer, weight, remainder, at, mask, scale,
    decay, momentum, of_gradient, of_buffer, lr, position, key1,
    split: tl.constexpr, writes: tl.constexpr,
):  # fmt: skip
    """Update the elements of one block; see `SGD.scalars`."""
    w = load_master(master, remainder, at, mask, split)
    g = tl.load(gradient + at, mask=mask).to(tl.float32) * scale + decay * w
    b = momentum * tl.load(buffer + at, mask=mask).to(tl.float32) + g
    w -= lr * (of_gradient * g + of_buffer * b)
    place = at.to(tl.uint32) + position.to(tl.uint32)
    store_rounded(buffer + at, b, noise(place, key1.to(tl.uint32)), mask)
    store_master(master, remainder, at, w, mask, split)
    if writes:
        store_nearest(weight + at, w, mask)


@triton.jit(do_not_specialize=PLAIN)
def sgd(
    gradient, master, buffer, weight, remainder, table, count, scale,
    decay, momentum, of_gradient, of_buffer, lr, position, key1,
    split: tl.constexpr, writes: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Update one block of one slab, or of those of a table; see `rows_of`."""
    start = tl.program_id(0).to(tl.int64) * block
    if many:
        start *= 0
        gradient, master = entry(table, 0, gradient), entry(table, 1, master)
        weight, remainder = entry(table, 2, weight), entry(table, 3, remainder)
        count, position = entry(table, 4, start), entry(table, 5, start)
        buffer = entry(table, 6, buffer)
    at = start + tl.arange(0, block)
    # Whole blocks go without a mask, so that several elements move in one instruction.
    if start + block <= count:
        sgd_block(
            gradient, master, buffer, weight, remainder, at, None, scale,
            decay, momentum, of_gradient, of_buffer, lr, position, key1, split, writes,
        )  # fmt: skip
    else:
        sgd_block(
            gradient, master, buffer, weight, remainder, at, at < count, scale,
            decay, momentum, of_gradient, of_buffer, lr, position, key1, split, writes,
        )  # fmt: skip


@triton.jit
def in_float64(x):
    """Widen; by way of float32, which Triton's interpreter too widens bfloat16 to."""
    if x.dtype == tl.float64:
        return x
    else:  # noqa: RET505  (both branches must not be compiled)
        return x.to(tl.float32).to(tl.float64)


@triton.jit(do_not_specialize=["count"])
def squares(values, partial, count, block: tl.constexpr, turns: tl.constexpr):
    """Sum the squares of one stretch, in float64."""
    start = tl.program_id(0).to(tl.int64) * (block * turns)
    total = tl.zeros([block], tl.float64)
    if start + block * turns <= count:
        for turn in range(turns):
            wide = in_float64(tl.load(values + start + turn * block + tl.arange(0, block)))
            total += wide * wide
    else:
        for turn in range(turns):
            at = start + turn * block + tl.arange(0, block)
            wide = in_float64(tl.load(values + at, mask=at < count, other=0.0))
            total += wide * wide
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


KERNELS = {"adamw": adamw, "sgd": sgd}


def sum_of_squares_on_gpu(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, 0-d float64, on the current stream; every element is read once.

    What is added to what depends on the length only.
    """
    programs = triton.cdiv(values.numel(), BLOCK * TURNS)
    partial = torch.empty(programs, dtype=torch.float64, device=values.device)
    if programs:
        with torch.cuda.device_of(values):
            squares[(programs,)](values, partial, values.numel(), block=BLOCK, turns=TURNS)
    return partial.sum()


def update_on_gpu(rule: UpdateRule, slab: Slab, step: Step, position: int) -> None:
    """Run the kernel over a whole slab, on the current stream."""
    launch(rule, slab, step, triton.cdiv(slab.gradient.numel(), BLOCK), position=position)


def update_many_on_gpu(
    rule: UpdateRule, slabs: Sequence[Slab], step: Step, positions: Sequence[int]
) -> None:
    """Run the kernel once over several slabs of the same dtypes, on the current stream.

    Args:
        rule: Rule of all.
        slabs: At least one.
        step: Step of all, but for `first_element`.
        positions: What `first_element` is of each.
    """
    rows = rows_of(slabs, positions)
    device = slabs[0].master.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = on_device(rows.tobytes(), device, stream)
    launch(rule, slabs[0], step, len(rows), table=table)


def rows_of(slabs: Sequence[Slab], positions: Sequence[int]) -> np.ndarray:
    """Return one row per block of every slab: addresses of gradient, master, weight and remainder
    (0 where there is none) in this block, elements from there on, the position of the first, and
    addresses of the moments.
    """
    rows: list[np.ndarray] = []
    for slab, position in zip(slabs, positions, strict=True):
        count = slab.gradient.numel()
        starts = np.arange(0, count, BLOCK, dtype=np.int64)
        part = np.zeros((len(starts), COLUMNS.value), dtype=np.int64)
        tensors = (slab.gradient, slab.master, slab.weight, slab.remainder)
        for column, tensor in zip((0, 1, 2, 3, 6, 7), (*tensors, *slab.moments), strict=False):
            if tensor is not None:
                part[:, column] = tensor.data_ptr() + starts * tensor.element_size()
        part[:, 4] = count - starts
        part[:, 5] = (position + starts) & 0xFFFFFFFF
        rows.append(part)
    return np.concatenate(rows)


@lru_cache(maxsize=1024)
def on_device(rows: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """Return rows as a tensor; they are the same in every step unless memory moves.

    One per stream: what is dropped from the cache may be overwritten by that stream's next work.
    """
    table = torch.frombuffer(bytearray(rows), dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def launch(
    rule: UpdateRule,
    slab: Slab,
    step: Step,
    programs: int,
    *,
    position: int = 0,
    table: torch.Tensor | None = None,
) -> None:
    """Run a kernel over one slab, or over those of a table that are like it."""
    scalars = (float(value) for value in rule.scalars(step.number, step.hyper))
    # An absent tensor is never touched; any pointer stands in for it.
    weight = slab.master if slab.weight is None else slab.weight
    remainder = slab.master if slab.remainder is None else slab.remainder
    with torch.cuda.device_of(slab.master):
        KERNELS[rule.name][(programs,)](
            slab.gradient,
            slab.master,
            *slab.moments,
            weight,
            remainder,
            slab.master if table is None else table,
            slab.gradient.numel(),
            step.gradient_scale,
            *scalars,
            signed(position),
            *(signed(int(key)) for key in rounding_keys(rule, step)),
            split=slab.remainder is not None,
            writes=slab.weight is not None,
            many=table is not None,
            block=BLOCK,
            enable_fp_fusion=False,
        )


def signed(bits: int) -> int:
    """Return 32 bits as the signed number a kernel argument takes."""
    bits &= 0xFFFFFFFF
    return bits - 2**32 if bits >= 2**31 else bits
