"""One-pass updates on the CPU: every element is read once and written once.

Numba compiles these loops at first use and keeps the result on disk; no compiler is needed on the
machine. The GIL is free while they run. They are serial on purpose: the caller owns the threads
and gives each a range, so that thread counts and cores are its own and no launcher's. Arithmetic is
IEEE single precision without contraction or reassociation: results do not depend on how the range
is cut or vectorised.

Numba has no bfloat16. Tensors of that type arrive as unsigned 16-bit integers and are widened and
rounded here; which code is used follows from the type of the array, at compile time, and what is
absent (None), a tensor or a threshold, compiles to nothing. All of it stays in one file: the
compiled code on disk is renewed when this file changes, and only then.
"""

# Numba compiles these functions from their bytecode and chooses by `overload` what they call, which
# pyright cannot follow; their signatures carry no types.
# pyright: basic, reportCallIssue=false

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LARGEST = np.float32(np.finfo(np.float32).max)


@intrinsic
def bits_of(typing_context, value):
    """Return the bit pattern of a float32 as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def float_of(typing_context, value):
    """Return the float32 that has a bit pattern."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def read(array, index):
    """Return one element as float32."""
    raise NotImplementedError("compiled only")


def write_nearest(array, index, value):
    """Store a float32, rounded to nearest even where the array is bfloat16."""
    raise NotImplementedError("compiled only")


def write_stochastic(array, index, value, noise):
    """Store a float32, rounded up with the probability of what is rounded off."""
    raise NotImplementedError("compiled only")


def read_master(master, remainder, index):
    """Return one element of a master, whole or split."""
    raise NotImplementedError("compiled only")


def write_master(master, remainder, index, value):
    """Store one element of a master, whole or split."""
    raise NotImplementedError("compiled only")


def guarded(value, limit):
    """Return a gradient; with a limit, 0 where it is not finite."""
    raise NotImplementedError("compiled only")


def limited(value, limit):
    """Return a value, its magnitude cut at the limit where there is one."""
    raise NotImplementedError("compiled only")


def crossed(gradient, direction, before, after):
    """Return 1 for what a limit before or after momentum cuts, or what is not finite, else 0."""
    raise NotImplementedError("compiled only")


@overload(read, inline="always")
def _read(array, index):
    if isinstance(array, types.NoneType):
        return lambda array, index: np.float32(0.0)
    if array.dtype == types.uint16:
        return lambda array, index: float_of(np.uint32(array[index]) << np.uint32(16))
    return lambda array, index: array[index]


@overload(write_nearest, inline="always")
def _write_nearest(array, index, value):
    if isinstance(array, types.NoneType):
        return lambda array, index, value: None
    if array.dtype == types.uint16:

        def store(array, index, value):
            bits = bits_of(value)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            up = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            array[index] = np.uint16(np.uint32(0x7FC0) if nan else up)

        return store

    def keep(array, index, value):
        array[index] = value

    return keep


@overload(write_stochastic, inline="always")
def _write_stochastic(array, index, value, noise):
    if isinstance(array, types.NoneType):
        return lambda array, index, value, noise: None
    if array.dtype == types.uint16:

        def store(array, index, value, noise):
            bits = bits_of(value)
            finite = np.uint32((bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000))
            added = finite * (noise & np.uint32(0xFFFF))
            array[index] = np.uint16((bits + added) >> np.uint32(16))

        return store

    def keep(array, index, value, noise):
        array[index] = value

    return keep


@overload(read_master, inline="always")
def _read_master(master, remainder, index):
    if isinstance(remainder, types.NoneType):
        return lambda master, remainder, index: master[index]

    def merge(master, remainder, index):
        low = np.uint32(np.int32(remainder[index]))
        return float_of((np.uint32(master[index]) << np.uint32(16)) + low)

    return merge


@overload(write_master, inline="always")
def _write_master(master, remainder, index, value):
    if isinstance(remainder, types.NoneType):

        def keep(master, remainder, index, value):
            master[index] = value

        return keep

    def split(master, remainder, index, value):
        bits = bits_of(value)
        high = (bits + np.uint32(0x8000)) >> np.uint32(16)
        master[index] = np.uint16(high)
        remainder[index] = np.int16(np.uint16(bits & np.uint32(0xFFFF)))

    return split


@overload(guarded, inline="always")
def _guarded(value, limit):
    if isinstance(limit, types.NoneType):
        return lambda value, limit: value
    # Comparisons with NaN are false.
    return lambda value, limit: value if np.abs(value) <= LARGEST else np.float32(0.0)


@overload(limited, inline="always")
def _limited(value, limit):
    if isinstance(limit, types.NoneType):
        return lambda value, limit: value

    def cut(value, limit):
        low = -limit if value < -limit else value
        return limit if value > limit else low

    return cut


@overload(crossed, inline="always")
def _crossed(gradient, direction, before, after):
    if not isinstance(after, types.NoneType):

        def late(gradient, direction, before, after):
            finite = np.abs(gradient) <= LARGEST
            return np.int64(not finite or np.abs(direction) > after)

        return late
    if isinstance(before, types.NoneType):
        return lambda gradient, direction, before, after: np.int64(0)
    return lambda gradient, direction, before, after: np.int64(
        not np.abs(gradient) <= min(before, LARGEST)
    )


@njit(inline="always")
def noise(position, key):
    """Return 32 well-mixed bits for a position (finaliser of MurmurHash3, Appleby 2011)."""
    # Numba widens 32-bit integers in every operation; each is cut back.
    x = np.uint32(position ^ key)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(nogil=True, cache=True, error_model="numpy")
def adamw(
    gradient, master, first, second, weight, remainder,
    scale, scalars, before, after, position, keys,
):  # fmt: skip
    """Update one range; see `AdamW.scalars` for the scalars (float32). `before` and `after` are
    the limits of the gradient and of the update, or None; return how many crossed them.
    """
    keep, beta1, rest1, beta2, rest2, root, eps, size = scalars
    count = np.int64(0)
    for i in range(gradient.shape[0]):
        raw = read(gradient, i) * scale
        g = guarded(guarded(raw, before), after)
        m = beta1 * read(first, i) + rest1 * limited(g, before)
        v = beta2 * read(second, i) + rest2 * (g * g)
        w = read_master(master, remainder, i) * keep
        direction = m / (np.sqrt(v) * root + eps)
        count += crossed(raw, direction, before, after)
        w -= size * limited(direction, after)
        at = np.uint32(position + np.uint32(i))
        write_stochastic(first, i, m, noise(at, keys[0]))
        write_stochastic(second, i, v, noise(at, keys[1]))
        write_master(master, remainder, i, w)
        write_nearest(weight, i, w)
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def sgd(
    gradient, master, buffer, weight, remainder, scale, scalars, before, after, position, keys
):  # fmt: skip
    """Update one range; see `SGD.scalars` for the scalars (float32), `adamw` for the limits. With
    no momentum the buffer is None.
    """
    keep, decay, momentum, of_gradient, of_buffer, lr = scalars
    count = np.int64(0)
    for i in range(gradient.shape[0]):
        w = read_master(master, remainder, i) * keep
        raw = read(gradient, i) * scale
        g = limited(guarded(guarded(raw, before), after), before) + decay * w
        b = momentum * read(buffer, i) + g
        direction = of_gradient * g + of_buffer * b
        count += crossed(raw, direction, before, after)
        w -= lr * limited(direction, after)
        write_stochastic(buffer, i, b, noise(np.uint32(position + np.uint32(i)), keys[0]))
        write_master(master, remainder, i, w)
        write_nearest(weight, i, w)
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def signum(
    gradient, master, buffer, weight, remainder, scale, scalars, before, after, position, keys
):  # fmt: skip
    """Update one range; arguments as of `sgd`."""
    keep, _, momentum, _, _, lr = scalars
    count = np.int64(0)
    for i in range(gradient.shape[0]):
        raw = read(gradient, i) * scale
        b = momentum * read(buffer, i) + limited(guarded(guarded(raw, before), after), before)
        sign = np.float32(b > 0.0) - np.float32(b < 0.0)
        count += crossed(raw, sign, before, after)
        w = read_master(master, remainder, i) * keep
        w -= lr * limited(sign, after)
        write_stochastic(buffer, i, b, noise(np.uint32(position + np.uint32(i)), keys[0]))
        write_master(master, remainder, i, w)
        write_nearest(weight, i, w)
    return count


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def squares(values):
    """Return the sum of squares in float64; the same code path for the same length."""
    total = 0.0
    for i in range(values.shape[0]):
        x = np.float64(read(values, i))
        total += x * x
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def add(total, values):
    """Add values (float32, or bfloat16 as its bits) to float32 totals."""
    for i in range(total.shape[0]):
        total[i] += read(values, i)


@njit(nogil=True, cache=True, error_model="numpy")
def magnitudes(values, scale, counts):
    """Add 1 to the bin of every magnitude that is neither 0 nor infinite; see `histogram`."""
    # Neighbours often fall into one bin: each of four waits for no other's count.
    lanes = np.zeros((4, counts.shape[0]), dtype=np.uint32)
    # Bins are computed several at once, which counting is not.
    bins = np.empty(1024, dtype=np.uint16)
    zeros = np.int64(0)
    for start in range(0, values.shape[0], bins.shape[0]):
        part = values[start : start + bins.shape[0]]
        for i in range(part.shape[0]):
            bits = np.uint32(bits_of(read(part, i) * scale) & np.uint32(0x7FFFFFFF))
            zeros += np.int64(bits == 0)
            bins[i] = np.uint16(bits >> np.uint32(20))
        for i in range(part.shape[0]):
            lanes[i & 3, bins[i]] += np.uint32(1)
    for place in range(0x7F8):
        for lane in range(4):
            counts[place] += lanes[lane, place]
    counts[0] -= zeros


KERNELS = {"adamw": adamw, "sgd": sgd, "signum": signum}

STATE = {"adamw": 2, "sgd": 1, "signum": 1}
"""Most moments that a kernel takes; what a rule keeps less of is None."""
