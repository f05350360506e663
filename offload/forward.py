"""The next forward pass waits for new weights layer by layer, not for the whole update.

A hook before every layer (before every FSDP2 unit, whose all-gather reads the shards of the whole
unit) lets the forward pass wait for just its parameters. A model whose layers' weights are read
elsewhere than in the layer needs `overlap="none"`.
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

        def before(_: nn.Module, __: Any, parameters: list[torch.Tensor] = parameters) -> None:
            wait_for(parameters)

        # First of all hooks: FSDP2's own gathers the shards.
        handles.append(module.register_forward_pre_hook(before, prepend=True))
    return handles


def units(model: nn.Module) -> list[tuple[nn.Module, list[torch.Tensor]]]:
    """Return the parts of a model that read their parameters at one time, in forward order.

    Parts are FSDP2 units where the model has them, else the members of module lists and sequences
    (the layers). Everything else, such as embedding and head, counts as read when the model itself
    is called, whichever of its modules does it: it comes first.
    """
    parts = list(layers_of(model))
    inside = {id(p) for part in parts for p in part.parameters()}
    outside: list[torch.Tensor] = [p for p in model.parameters() if id(p) not in inside]
    rest: list[tuple[nn.Module, list[torch.Tensor]]] = [
        (part, list(part.parameters())) for part in parts
    ]
    return [(model, outside), *rest] if outside else rest


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost layers below a module."""
    sharded = any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)
    for child in module.children():
        if isinstance(child, FSDPModule):
            yield child
        elif isinstance(child, (nn.ModuleList, nn.Sequential)) and not sharded:
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from layers_of(child)


def forward_order(model: nn.Module) -> dict[torch.Tensor, int]:
    """Return the place of every parameter in the order in which a forward pass needs them."""
    order: dict[torch.Tensor, int] = {}
    for _, parameters in units(model):
        for parameter in parameters:
            order.setdefault(parameter, len(order))
    return order
