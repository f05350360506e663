"""Measures what stays in memory: every tensor that was computed inside, and whether it is alive.

A dispatch mode sees each operation's results and keeps weak references to their storages, so what
is counted is what autograd, caches and modules really hold, each storage once. Tensors that existed
before, and parameters, do not count.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Notes the memory of everything computed inside, and knows what of it is still alive.

    Args:
        views_of_outside: Whether a view of a tensor that was there before counts, as the whole of
            what it looks at.
    """

    def __init__(self, *, views_of_outside: bool = True) -> None:
        super().__init__()
        self.views_of_outside = views_of_outside
        self.noted: dict[int, tuple[StorageWeakRef, int]] = {}
        self.outside: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and note the storages of its results."""
        if not self.views_of_outside:
            for reference, _ in storages_of((args, kwargs)):
                if not is_alive(self.noted.get(reference.cdata, (None, 0))[0]):
                    self.outside[reference.cdata] = reference
        result = operation(*args, **(kwargs or {}))
        for reference, size in storages_of(result):
            if not is_alive(self.outside.get(reference.cdata)):
                self.noted[reference.cdata] = reference, size
        return result

    def bytes(self) -> int:
        """Return what is alive now, in bytes."""
        return sum(size for reference, size in self.noted.values() if not reference.expired())


def storages_of(values: object) -> Iterator[tuple[StorageWeakRef, int]]:
    """Yield the storage of every tensor in nested containers, weakly, and its bytes."""
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            yield StorageWeakRef(storage), storage.nbytes()


def is_alive(reference: StorageWeakRef | None) -> bool:
    """Whether a storage is known and still there; its address may serve another one later."""
    return reference is not None and not reference.expired()


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
