"""Whose gradients are whose: a parameter has one `OffloadedOptimizer` at a time.

Two would each take gradients over, and the second would find nothing. Hooks hold their optimizer
weakly, so that one that is dropped frees its state and its threads and hands its parameters on.
"""

import _thread
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from interlace.offload.lanes import Lanes
from interlace.offload.roster import Roster

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


def release(parameters: Iterable[torch.Tensor], optimizer: object) -> None:
    """Leave those parameters of an optimizer without an owner."""
    for parameter in parameters:
        if parameter in _owners and _owners[parameter]() is optimizer:
            del _owners[parameter]


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a bound method as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        living = reference()
        if living is not None:
            living(*arguments)

    return call


def end(roster: Roster, lanes: Lanes, handles: Sequence[RemovableHandle]) -> None:
    """Let an optimizer's work end, then its threads, and take its hooks off."""
    roster.settle()
    for handle in handles:
        handle.remove()
    lanes.close()


def end_later(roster: Roster, lanes: Lanes, handles: Sequence[RemovableHandle]) -> None:
    """End an optimizer that was dropped. Who collects it may be one of its own threads, or hold any
    lock: nothing is waited for here, and no lock is taken to start the thread that does wait.
    """
    _thread.start_new_thread(end, (roster, lanes, handles))
