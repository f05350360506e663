"""Whose gradients are whose: a parameter has one `OffloadedOptimizer` at a time.

Two would each take gradients over, and the second would find nothing. Hooks hold their optimizer
weakly, so that one that is dropped frees its state and its threads and hands its parameters on.
"""

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def claim(parameters: Iterable[torch.Tensor], optimizer: object) -> None:
    """Make an optimizer the owner of parameters.

    Raises:
        ValueError: One of them has an owner that is still in use.
    """
    wanted = list(parameters)
    if owned_by_another(wanted, optimizer):
        # What nobody holds any more may merely not be collected yet.
        gc.collect()
    if owned_by_another(wanted, optimizer):
        raise ValueError(
            "another OffloadedOptimizer serves a parameter of shape "
            f"{tuple(owned_by_another(wanted, optimizer)[0].shape)} and would take its gradients "
            "away; call close() on that one first"
        )
    for parameter in wanted:
        _owners[parameter] = weakref.ref(optimizer)


def owned_by_another(parameters: Iterable[torch.Tensor], optimizer: object) -> list[torch.Tensor]:
    """Return the parameters that another living optimizer owns."""
    return [p for p in parameters if p in _owners and _owners[p]() not in (None, optimizer)]


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Leave parameters without an owner."""
    for parameter in parameters:
        _owners.pop(parameter, None)


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a bound method as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        living = reference()
        if living is not None:
            living(*arguments)

    return call
