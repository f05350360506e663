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

from interlace.kernels.update.clip import CoordinateClip, limits_of
from interlace.kernels.update.limit import Count
from interlace.kernels.update.rules import UpdateRule
from interlace.kernels.update.slab import Slab, Step, rounding_keys

BLOCK = 1024

TURNS = 16
"""Blocks that one program of `squares` adds up."""

COLUMNS = tl.constexpr(9)
"""Entries of a row of the table of many slabs; see `rows_of`."""

SCALARS = tl.constexpr(16)
"""Numbers of 32 bits that a slab's update has of its own; see `scalars_of`."""

LARGEST = tl.constexpr(float(np.finfo(np.float32).max))

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
def number(own, column: tl.constexpr):
    """Return a float32 of a slab's scalars."""
    return tl.load(own + column).to(tl.float32, bitcast=True)


@triton.jit
def guarded(value, stage: tl.constexpr):
    """Return a gradient; of a rule that clips, 0 where it is not finite."""
    if stage > 0:
        return tl.where(tl.abs(value) <= LARGEST, value, 0.0)
    else:  # noqa: RET505  (both branches must not be compiled)
        return value


@triton.jit
def limited(value, limit, here: tl.constexpr):
    """Return a value; its magnitude cut at the limit if that is for here."""
    if here:
        return tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
    else:  # noqa: RET505  (both branches must not be compiled)
        return value


@triton.jit
def count_crossed(counter, raw, direction, limit, inside, stage: tl.constexpr):
    """Add to a counter what the limit cuts of a block, or what is not finite."""
    if stage == 1:
        within = tl.abs(raw) <= tl.minimum(limit, LARGEST)
    else:
        within = (tl.abs(raw) <= LARGEST) & ((tl.abs(direction) > limit) == 0)
    found = tl.sum((inside & (within == 0)).to(tl.int32), 0)
    tl.atomic_add(counter, found.to(tl.int64), sem="relaxed")


@triton.jit
def adamw_block(
    gradient, master, first, second, weight, remainder, counter, at, mask, count, scale,
    keep, beta1, rest1, beta2, rest2, root, eps, size, limit, position, key1, key2,
    stage: tl.constexpr, split: tl.constexpr, writes: tl.constexpr,
):  # fmt: skip
    """Update the elements of one block; see `AdamW.scalars`."""
    raw = tl.load(gradient + at, mask=mask).to(tl.float32) * scale
    g = guarded(raw, stage)
    m = beta1 * tl.load(first + at, mask=mask).to(tl.float32) + rest1 * limited(
        g, limit, stage == 1
    )
    v = beta2 * tl.load(second + at, mask=mask).to(tl.float32) + rest2 * (g * g)
    w = load_master(master, remainder, at, mask, split) * keep
    direction = tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    w -= size * limited(direction, limit, stage == 2)
    place = at.to(tl.uint32) + position.to(tl.uint32)
    store_rounded(first + at, m, noise(place, key1.to(tl.uint32)), mask)
    store_rounded(second + at, v, noise(place, key2.to(tl.uint32)), mask)
    store_master(master, remainder, at, w, mask, split)
    if writes:
        store_nearest(weight + at, w, mask)
    if stage > 0:
        count_crossed(counter, raw, direction, limit, at < count, stage)


@triton.jit(do_not_specialize=PLAIN)
def adamw(
    gradient, master, first, second, weight, remainder, table, scalars, counter, count, scale,
    keep, beta1, rest1, beta2, rest2, root, eps, size, limit, position, key1, key2,
    stage: tl.constexpr, split: tl.constexpr, writes: tl.constexpr, many: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Update one block of one slab, or of those of a table; see `rows_of` and `scalars_of`."""
    start = tl.program_id(0).to(tl.int64) * block
    if many:
        start *= 0
        gradient, master = entry(table, 0, gradient), entry(table, 1, master)
        weight, remainder = entry(table, 2, weight), entry(table, 3, remainder)
        count, position = entry(table, 4, start), entry(table, 5, start)
        slab = entry(table, 6, start)
        first, second = entry(table, 7, first), entry(table, 8, second)
        counter += slab
        own = scalars + slab * SCALARS
        scale, limit = number(own, 0), number(own, 1)
        key1, key2 = tl.load(own + 2), tl.load(own + 3)
        keep, beta1, rest1 = number(own, 4), number(own, 5), number(own, 6)
        beta2, rest2, root = number(own, 7), number(own, 8), number(own, 9)
        eps, size = number(own, 10), number(own, 11)
    at = start + tl.arange(0, block)
    # Whole blocks go without a mask, so that several elements move in one instruction.
    if start + block <= count:
        adamw_block(
            gradient, master, first, second, weight, remainder, counter, at, None, count, scale,
            keep, beta1, rest1, beta2, rest2, root, eps, size, limit, position, key1, key2,
            stage, split, writes,
        )  # fmt: skip
    else:
        adamw_block(
            gradient, master, first, second, weight, remainder, counter, at, at < count, count,
            scale, keep, beta1, rest1, beta2, rest2, root, eps, size, limit, position, key1, key2,
            stage, split, writes,
        )  # fmt: skip


@triton.jit
def sgd_block(
    gradient, master, buffer, weight, remainder, counter, at, mask, count, scale,
    keep, decay, momentum, of_gradient, of_buffer, lr, limit, position, key1,
    signs: tl.constexpr, keeps: tl.constexpr, stage: tl.constexpr, split: tl.constexpr,
    writes: tl.constexpr,
):  # fmt: skip
    """Update the elements of one block; see `SGD.scalars`, `Signum.scalars`."""
    w = load_master(master, remainder, at, mask, split) * keep
    raw = tl.load(gradient + at, mask=mask).to(tl.float32) * scale
    g = limited(guarded(raw, stage), limit, stage == 1)
    if not signs:
        g += decay * w
    if keeps:
        b = momentum * tl.load(buffer + at, mask=mask).to(tl.float32) + g
        place = at.to(tl.uint32) + position.to(tl.uint32)
        store_rounded(buffer + at, b, noise(place, key1.to(tl.uint32)), mask)
    else:
        b = momentum * 0.0 + g
    if signs:
        direction = (b > 0.0).to(tl.float32) - (b < 0.0).to(tl.float32)
    else:
        direction = of_gradient * g + of_buffer * b
    w -= lr * limited(direction, limit, stage == 2)
    store_master(master, remainder, at, w, mask, split)
    if writes:
        store_nearest(weight + at, w, mask)
    if stage > 0:
        count_crossed(counter, raw, direction, limit, at < count, stage)


@triton.jit(do_not_specialize=PLAIN)
def sgd(
    gradient, master, buffer, weight, remainder, table, scalars, counter, count, scale,
    keep, decay, momentum, of_gradient, of_buffer, lr, limit, position, key1,
    signs: tl.constexpr, keeps: tl.constexpr, stage: tl.constexpr, split: tl.constexpr,
    writes: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Update one block of one slab, or of those of a table; see `rows_of` and `scalars_of`."""
    start = tl.program_id(0).to(tl.int64) * block
    if many:
        start *= 0
        gradient, master = entry(table, 0, gradient), entry(table, 1, master)
        weight, remainder = entry(table, 2, weight), entry(table, 3, remainder)
        count, position = entry(table, 4, start), entry(table, 5, start)
        slab = entry(table, 6, start)
        buffer = entry(table, 7, buffer)
        counter += slab
        own = scalars + slab * SCALARS
        scale, limit, key1 = number(own, 0), number(own, 1), tl.load(own + 2)
        keep, decay, momentum = number(own, 4), number(own, 5), number(own, 6)
        of_gradient, of_buffer, lr = number(own, 7), number(own, 8), number(own, 9)
    at = start + tl.arange(0, block)
    # Whole blocks go without a mask, so that several elements move in one instruction.
    if start + block <= count:
        sgd_block(
            gradient, master, buffer, weight, remainder, counter, at, None, count, scale,
            keep, decay, momentum, of_gradient, of_buffer, lr, limit, position, key1,
            signs, keeps, stage, split, writes,
        )  # fmt: skip
    else:
        sgd_block(
            gradient, master, buffer, weight, remainder, counter, at, at < count, count, scale,
            keep, decay, momentum, of_gradient, of_buffer, lr, limit, position, key1,
            signs, keeps, stage, split, writes,
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


KERNELS = {"adamw": adamw, "sgd": sgd, "signum": sgd}


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


def update_on_gpu(rule: UpdateRule, slab: Slab, step: Step, position: int) -> Count:
    """Run the kernel over a whole slab, on the current stream; return how many coordinates it cut,
    0-d int64 on the device (0 of a rule that does not clip).
    """
    counter = counters(rule, 1, slab.master.device)
    launch(rule, slab, step, triton.cdiv(slab.gradient.numel(), BLOCK), counter, position=position)
    return 0 if counter is None else counter[0]


def update_many_on_gpu(
    rule: UpdateRule, slabs: Sequence[Slab], steps: Sequence[Step]
) -> Sequence[Count]:
    """Run the kernel once over several slabs of the same dtypes, on the current stream.

    Args:
        rule: Rule of all.
        slabs: At least one.
        steps: One of each; numbers and hyperparameters may differ.

    Returns:
        What `update_on_gpu` returns of each.
    """
    device = slabs[0].master.device
    rows = rows_of(slabs, [step.first_element for step in steps])
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = on_device(rows.tobytes(), device, stream)
    scalars = uploaded(torch.from_numpy(scalars_of(rule, steps)), device)
    counter = counters(rule, len(slabs), device)
    launch(rule, slabs[0], steps[0], len(rows), counter, table=table, scalars=scalars)
    return [0] * len(slabs) if counter is None else counter.unbind()


def counters(rule: UpdateRule, count: int, device: torch.device) -> torch.Tensor | None:
    """Return so many counters at 0, int64; or None for a rule that does not clip."""
    clips = isinstance(rule, CoordinateClip)
    return torch.zeros(count, dtype=torch.int64, device=device) if clips else None


def rows_of(slabs: Sequence[Slab], positions: Sequence[int]) -> np.ndarray:
    """Return one row per block of every slab: addresses of gradient, master, weight and remainder
    (0 where there is none) in this block, elements from there on, the position of the first, the
    number of the slab, and addresses of the moments.
    """
    rows: list[np.ndarray] = []
    for number_of_slab, (slab, position) in enumerate(zip(slabs, positions, strict=True)):
        count = slab.gradient.numel()
        starts = np.arange(0, count, BLOCK, dtype=np.int64)
        part = np.zeros((len(starts), COLUMNS.value), dtype=np.int64)
        tensors = (slab.gradient, slab.master, slab.weight, slab.remainder)
        for column, tensor in zip((0, 1, 2, 3, 7, 8), (*tensors, *slab.moments), strict=False):
            if tensor is not None:
                part[:, column] = tensor.data_ptr() + starts * tensor.element_size()
        part[:, 4] = count - starts
        part[:, 5] = (position + starts) & 0xFFFFFFFF
        part[:, 6] = number_of_slab
        rows.append(part)
    return np.concatenate(rows)


def scalars_of(rule: UpdateRule, steps: Sequence[Step]) -> np.ndarray:
    """Return (slabs, `SCALARS`) int32, the bits of one row per slab: gradient scale, limit, two
    keys of rounding, and the scalars of the rule.
    """
    rows = np.zeros((len(steps), SCALARS.value), dtype=np.int32)
    floats = rows.view(np.float32)
    known: dict[tuple[object, ...], int] = {}
    for row, step in enumerate(steps):
        same = (step.number, step.gradient_scale, step.rounding_seed, id(step.hyper))
        first = known.setdefault(same, row)
        if first < row:
            rows[row] = rows[first]
            continue
        scalars = rule.scalars(step.number, step.hyper)
        floats[row, :2] = step.gradient_scale, limit_of(rule, step)[0]
        floats[row, 4 : 4 + len(scalars)] = scalars
        for column, key in enumerate(rounding_keys(rule, step), start=2):
            rows[row, column] = signed(int(key))
    return rows


def limit_of(rule: UpdateRule, step: Step) -> tuple[float, int]:
    """Return the limit of an update and what it limits: 0 nothing, 1 gradient, 2 direction."""
    before, after = limits_of(rule, step.number, step.hyper)
    if before is not None:
        return before, 1
    return (0.0, 0) if after is None else (after, 2)


@lru_cache(maxsize=1024)
def on_device(rows: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """Return rows as a tensor; they are the same in every step unless memory moves.

    One per stream: what is dropped from the cache may be overwritten by that stream's next work.
    """
    return uploaded(torch.frombuffer(bytearray(rows), dtype=torch.int64), device)


def uploaded(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, without waiting for the copy."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def launch(
    rule: UpdateRule,
    slab: Slab,
    step: Step,
    programs: int,
    counter: torch.Tensor | None,
    *,
    position: int = 0,
    table: torch.Tensor | None = None,
    scalars: torch.Tensor | None = None,
) -> None:
    """Run a kernel over one slab, or over those of a table that are like it."""
    kernel = KERNELS[rule.name]
    limit, stage = limit_of(rule, step)
    # What is absent is never touched; any pointer stands in for it.
    absent = slab.master
    buffers: list[torch.Tensor] = list(slab.moments)
    keys = [signed(int(key)) for key in rounding_keys(rule, step)]
    constants: dict[str, bool] = {}
    if kernel is sgd:
        constants = {"signs": rule.name == "signum", "keeps": bool(buffers)}
        buffers, keys = buffers or [absent], keys or [0]
    with torch.cuda.device_of(slab.master):
        kernel[(programs,)](
            slab.gradient,
            slab.master,
            *buffers,
            absent if slab.weight is None else slab.weight,
            absent if slab.remainder is None else slab.remainder,
            absent if table is None else table,
            absent if scalars is None else scalars,
            absent if counter is None else counter,
            slab.gradient.numel(),
            step.gradient_scale,
            *(float(value) for value in rule.scalars(step.number, step.hyper)),
            limit,
            signed(position),
            *keys,
            stage=stage,
            split=slab.remainder is not None,
            writes=slab.weight is not None,
            many=table is not None,
            block=BLOCK,
            enable_fp_fusion=False,
            **constants,
        )


def signed(bits: int) -> int:
    """Return 32 bits as the signed number a kernel argument takes."""
    bits &= 0xFFFFFFFF
    return bits - 2**32 if bits >= 2**31 else bits
