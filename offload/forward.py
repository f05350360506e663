"""The next forward pass waits for new weights part by part, not for the whole update.

A hook before every layer (before every FSDP2 unit, whose all-gather reads the shards of the whole
unit) lets the forward pass wait for just its parameters. Saving and loading the model's own state
dict wait for all of them. Who reads or writes weights in other ways, between steps, calls
`OffloadedOptimizer.synchronize` first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

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
    for module, read in readers(model):

        def before(
            _: nn.Module, __: Any, read: Callable[[], Sequence[torch.Tensor]] = read
        ) -> None:
            wait_for(read())

        # A compiled module takes this call out of its graph. First of all hooks: FSDP2's own
        # gathers the shards.
        outside_graphs = cast("Callable[[nn.Module, Any], None]", torch.compiler.disable(before))
        handles.append(module.register_forward_pre_hook(outside_graphs, prepend=True))
    for module, own in parts_by_themselves(model):

        def before_part(_: nn.Module, __: Any, own: Sequence[torch.Tensor] = own) -> None:
            # Inside a graph its layer has waited already.
            if not torch.compiler.is_compiling():
                wait_for(own)

        handles.append(module.register_forward_pre_hook(before_part, prepend=True))
    return handles


def wait_around_state_dicts(
    model: nn.Module, synchronize: Callable[[], None], settle: Callable[[], None]
) -> list[RemovableHandle]:
    """Call `synchronize()` before a model's state dict is taken, and `settle()`, which does not
    mind failed updates, before one is loaded.

    Returns:
        Handles that take the hooks off again.
    """
    return [
        model.register_state_dict_pre_hook(lambda *_: synchronize()),
        model.register_load_state_dict_pre_hook(lambda *_: settle()),
    ]


def readers(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, Callable[[], Sequence[torch.Tensor]]]]:
    """Yield every module whose forward begins to read parameters, and which these are then."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        shards = parameters_by_state(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state = state_of(module)
                yield module, lambda state=state: gathered_with(state, shards)
        gathered = {id(p) for parameters in shards.values() for p in parameters}
        rest = [p for p in model.parameters() if id(p) not in gathered]
        if rest:
            yield model, lambda: rest
        return
    for module, parameters in units(model):
        yield module, lambda parameters=parameters: parameters


def parts_by_themselves(model: nn.Module) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """Yield every module with parameters of its own that FSDP2 does not gather: it may be called by
    itself, outside its layer's or the model's forward.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    for module in model.modules():
        own: list[torch.Tensor] = list(module.parameters(recurse=False))
        if own and module is not model:
            yield module, own


def units(model: nn.Module) -> list[tuple[nn.Module, list[torch.Tensor]]]:
    """Return the parts of a model that read their parameters at one time, in forward order.

    Parts are FSDP2 units where the model has them, else the members of module lists and sequences
    (the layers). Everything else, such as embedding and head, counts as read when the model itself
    is called, whichever of its modules does it: it comes first.
    """
    parts: list[tuple[nn.Module, list[torch.Tensor]]] = [
        (model, parameters) for parameters in parameters_by_state(model).values()
    ] or [(part, list(part.parameters())) for part in layers_of(model)]
    inside = {id(p) for _, parameters in parts for p in parameters}
    outside: list[torch.Tensor] = [p for p in model.parameters() if id(p) not in inside]
    return [(model, outside), *parts] if outside else parts


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost layers of a module: the members of module lists and sequences; lists and
    dicts among them are nothing that could be called.
    """
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        for part in module:
            if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
                yield from layers_of(nn.ModuleList(part.children()))
            elif any(True for _ in part.parameters()):
                yield part
        return
    for child in module.children():
        yield from layers_of(child)


# ---- FSDP2: the shards of a unit are read when the unit is gathered ---------------------------


def state_of(module: FSDPModule) -> Any:
    """Return FSDP2's state of a module; modules that are gathered together share it."""
    return module._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]


def parameters_by_state(model: nn.Module) -> dict[Any, list[torch.Tensor]]:
    """Return the sharded parameters of a model by the FSDP2 state that gathers them, in forward
    order; empty for a model without FSDP2.
    """
    shards: dict[Any, list[torch.Tensor]] = {}

    def walk(module: nn.Module, state: Any) -> None:
        if isinstance(module, FSDPModule):
            state = state_of(module)
            shards.setdefault(state, [])
        if state is not None:
            known = {id(p) for p in shards[state]}
            own = module.parameters(recurse=False)
            shards[state] += [p for p in own if id(p) not in known]
        for child in module.children():
            walk(child, state)

    walk(model, None)
    return shards


def gathered_with(state: Any, shards: dict[Any, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return what is gathered when a unit's forward begins: its own shards, and those of the units
    it was told to fetch ahead (`set_modules_to_forward_prefetch`).
    """
    ahead = getattr(state, "_states_to_forward_prefetch", ())
    return [p for each in (state, *ahead) for p in shards.get(each, ())]


def forward_order(model: nn.Module) -> dict[torch.Tensor, int]:
    """Return the place of every parameter in the order in which a forward pass needs them."""
    order: dict[torch.Tensor, int] = {}
    for _, parameters in units(model):
        for parameter in parameters:
            order.setdefault(parameter, len(order))
    return order
