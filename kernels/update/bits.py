"""Element access for compiled CPU kernels: float32 as it is, bfloat16 through its 16 bits.

Numba has no bfloat16. Tensors of that type reach the kernels as unsigned 16-bit integers and are
widened and rounded here; which code is used follows from the type of the array, at compile time,
and an absent tensor (None) compiles to nothing.
"""

# Numba compiles these functions from their bytecode: signatures carry no types, and what they call
# is chosen by `overload`, which pyright cannot follow.
# pyright: basic

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


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


@overload(read, inline="always")
def _read(array, index):
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
