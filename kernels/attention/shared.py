"""What is derived from the tensors of a mask is derived once, for all layers of all steps.

Masks come as small tensors: segment ids, boundaries. Ranges and block lists follow from them, the
same in every layer. They are kept as long as the tensors live, and made anew once their contents
were changed in place.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch._C._functorch import maybe_current_level
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")

KEPT: Any = WeakTensorKeyDictionary()
"""Tensor to what was made of it: how often it had been changed by then, and results by key."""

MOST = 16
"""Results of one tensor that are kept; layers of one model differ in windows, if in anything."""


def made_here_stays_here() -> bool:
    """Whether tensors that are made now must not be kept for later calls.

    Those of inference mode have no version, and must not reach a training step; those made while a
    compiler traces, or under torch.func transforms, are stand-ins that mean nothing outside.
    """
    tracing = torch.compiler.is_compiling() or maybe_current_level() is not None
    return tracing or torch.is_inference_mode_enabled()


def made_once(source: torch.Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """Return `make()`, or what it returned before for the same tensor and key.

    Args:
        source: The tensor whose contents decide the result.
        key: Everything else that does.
        make: Makes it; the result must not hold `source` itself, which it would keep alive.
    """
    if made_here_stays_here() or source.is_inference():
        return make()
    version, results = KEPT.get(source, (None, {}))
    if version != source._version:
        version, results = source._version, {}
        KEPT[source] = version, results
    if key not in results:
        while len(results) >= MOST:
            del results[next(iter(results))]
        results[key] = make()
    return results[key]
