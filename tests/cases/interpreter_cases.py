"""What Triton's interpreter can show of a kernel: the bytes it moves, and that the order of its
programs does not matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class CountedMemory:
    """Stands in for the interpreter's loads and stores and counts what their masks let through."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.loaded = 0
        self.stored = 0

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.loaded += int(mask.sum()) * np.dtype(dtype).itemsize
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self.stored += int(mask.sum()) * values.dtype.itemsize
        return self.memory.store(pointers, values, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)


@contextmanager
def counted_bytes() -> Iterator[CountedMemory]:
    """Count the bytes that kernels load and store inside."""
    from triton.runtime import interpreter

    memory = CountedMemory(interpreter._interpreter)
    interpreter._interpreter = memory
    try:
        yield memory
    finally:
        interpreter._interpreter = memory.memory


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of one-dimensional grids in a random order inside."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dimensions, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def dimensions(x: int, y: int, z: int) -> None:
        assert y == z == 1
        order[:] = np.random.default_rng(seed).permutation(x).tolist()
        set_dimensions(x, y, z)

    def index(x: int, y: int, z: int) -> None:
        set_index(order[x], y, z)

    builder.set_grid_dim, builder.set_grid_idx = dimensions, index
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
