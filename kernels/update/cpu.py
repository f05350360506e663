"""One-pass updates on the CPU: every element is read once and written once.

Numba compiles these loops at first use and keeps the result on disk; no compiler is needed on the
machine. The GIL is free while they run. They are serial on purpose: the caller owns the threads
and gives each a range, so that thread counts and cores are its own and no launcher's. Arithmetic is
IEEE single precision without contraction or reassociation: results do not depend on how the range
is cut or vectorised.
"""

# Compiled from bytecode by Numba: see bits.py.
# pyright: basic

import numpy as np
from numba import njit

from interlace.kernels.update.bits import (
    read,
    read_master,
    write_master,
    write_nearest,
    write_stochastic,
)


@njit(inline="always")
def noise(position, key):
    """Return 32 well-mixed bits for a position (finaliser of MurmurHash3, Appleby 2011)."""
    x = position ^ key
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


@njit(nogil=True, cache=True, error_model="numpy")
def adamw(gradient, master, first, second, weight, remainder, scale, scalars, position, keys):
    """Update one range; see `AdamW.scalars` for the scalars (float32)."""
    keep, beta1, rest1, beta2, rest2, root, eps, size = scalars
    for i in range(gradient.shape[0]):
        g = read(gradient, i) * scale
        m = beta1 * read(first, i) + rest1 * g
        v = beta2 * read(second, i) + rest2 * (g * g)
        w = read_master(master, remainder, i) * keep
        w -= size * (m / (np.sqrt(v) * root + eps))
        at = position + np.uint32(i)
        write_stochastic(first, i, m, noise(at, keys[0]))
        write_stochastic(second, i, v, noise(at, keys[1]))
        write_master(master, remainder, i, w)
        write_nearest(weight, i, w)


@njit(nogil=True, cache=True, error_model="numpy")
def sgd(gradient, master, buffer, weight, remainder, scale, scalars, position, keys):
    """Update one range; see `SGD.scalars` for the scalars (float32)."""
    decay, momentum, of_gradient, of_buffer, lr = scalars
    for i in range(gradient.shape[0]):
        w = read_master(master, remainder, i)
        g = read(gradient, i) * scale + decay * w
        b = momentum * read(buffer, i) + g
        w -= lr * (of_gradient * g + of_buffer * b)
        write_stochastic(buffer, i, b, noise(position + np.uint32(i), keys[0]))
        write_master(master, remainder, i, w)
        write_nearest(weight, i, w)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def squares(values):
    """Return the sum of squares in float64; the same code path for the same length."""
    total = 0.0
    for i in range(values.shape[0]):
        x = np.float64(read(values, i))
        total += x * x
    return total


KERNELS = {"adamw": adamw, "sgd": sgd}
