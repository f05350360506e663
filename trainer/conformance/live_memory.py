"""Measures what stays in memory: every tensor that was computed inside, and whether it is alive.

A dispatch mode sees each operation's results and keeps weak references to their storages, so what
is counted is what autograd, caches and modules really hold, each storage once. Tensors that existed
before, and parameters, do not count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Notes the memory of everything computed inside, and knows what of it is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and note the storages of its results."""
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.noted[reference.cdata] = reference, storage.nbytes()
        return result

    def bytes(self) -> int:
        """Return what is alive now, in bytes."""
        return sum(size for reference, size in self.noted.values() if not reference.expired())


class PeakMemory(LiveTensors):
    """Notes the most that was alive after any operation, in bytes, as `peak`."""

    peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and see whether more is alive than ever before."""
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        self.peak = max(self.peak, self.bytes())
        return result
