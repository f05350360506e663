"""The next forward pass waits for new weights layer by layer, not for the whole update.

A hook before every module that holds parameters of its own, and before every FSDP2 unit (whose
all-gather reads the shards of the whole unit), lets the forward pass wait for just these.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

WaitFor = Callable[[Sequence[torch.Tensor]], None]


def wait_in_forward(model: nn.Module, wait_for: WaitFor) -> list[RemovableHandle]:
    """Call `wait_for(parameters)` before each part of a model computes with them.

    Returns:
        Handles that take the hooks off again.
    """
    handles: list[RemovableHandle] = []
    for module, parameters in units(model):

        def before(_: nn.Module, __: Any, parameters: Sequence[torch.Tensor] = parameters) -> None:
            wait_for(parameters)

        # First of all hooks: FSDP2's own gathers the shards.
        handles.append(module.register_forward_pre_hook(before, prepend=True))
    return handles


def units(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[torch.Tensor]]]:
    """Yield every module that reads parameters, with these."""
    if isinstance(module, FSDPModule):
        inner = list(nested_units(module))
        theirs = {id(p) for unit in inner for p in unit.parameters()}
        own = [p for p in module.parameters() if id(p) not in theirs]
        if own:
            yield module, own
        for unit in inner:
            yield from units(unit)
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        yield from units(child)


def nested_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost FSDP2 units below a module."""
    for child in module.children():
        if isinstance(child, FSDPModule):
            yield child
        else:
            yield from nested_units(child)
