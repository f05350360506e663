"""Loading an optimizer state dict into live slabs, whatever their home and form are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from interlace.kernels.update import UpdateRule, merge_master
from interlace.offload.row_blocks import ROW_BLOCKS, block_count
from interlace.offload.subgroup import MASTER, REMAINDER, THRESHOLD, Member, SubgroupState, local

NOT_OURS = {
    "amsgrad": False,
    "maximize": False,
    "dampening": 0,
    "decoupled_weight_decay": True,
}
"""Settings of torch's optimizers that change the update, and the only value that our rules mean."""


Saved = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Every parameter and the state that was saved of it; empty before its first update."""


def checked(
    rule: UpdateRule, groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> Saved:
    """Return what a state dict holds for every parameter; raise `ValueError`, before anything is
    written, if it does not fit; see `OffloadedOptimizer.load_state_dict`.
    """
    saved_groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in saved_groups]
    ours = [len(group["params"]) for group in groups]
    if sizes != ours:
        raise ValueError(
            f"the state dict has parameter groups of {sizes} parameters, this optimizer of {ours}"
        )
    numbers = [number for group in saved_groups for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = [present(state_dict["state"].get(number, {})) for number in numbers]
    for group in saved_groups:
        check_settings(rule, group)
    of_parameter = [group for group in groups for _ in group["params"]]
    for parameter, state, group in zip(parameters, states, of_parameter, strict=True):
        check_saved(rule, parameter, state)
        check_thresholds(group, parameter, state)
    return list(zip(parameters, states, strict=True))


def load_state(
    groups: Sequence[dict[str, Any]],
    places: Mapping[torch.Tensor, tuple[SubgroupState, Member]],
    saved: Saved,
    state_dict: Mapping[str, Any],
) -> None:
    """Copy what `checked` returned into live parameter groups and slabs, with no work under way."""
    for parameter, state in saved:
        if parameter in places:
            load_member(*places[parameter], state)
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        # Row blocks are the model's, and thresholds are counted by them.
        ours = ("params", ROW_BLOCKS)
        group.update({key: value for key, value in saved_group.items() if key not in ours})


def present(saved: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Return the entries that hold something: torch's SGD saves None before its first update."""
    return {name: tensor for name, tensor in saved.items() if tensor is not None}


def check_settings(rule: UpdateRule, group: Mapping[str, Any]) -> None:
    """Refuse a saved group whose settings ask for another update than the rule's."""
    for name, value in NOT_OURS.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"the state dict was trained with {name}={group[name]}, which the rule {rule.name} "
                f"does not know: it updates as with {name}={value}"
            )
    if group.get("momentum") and "momentum" in rule.hyperparameters() and not rule.moments:
        raise ValueError(
            f"the state dict was trained with momentum={group['momentum']}, and the rule "
            f"{rule.name} was made with momentum=0.0 and keeps no buffer for it; make it with "
            f"momentum={group['momentum']}"
        )


def check_saved(
    rule: UpdateRule, parameter: torch.Tensor, saved: Mapping[str, torch.Tensor]
) -> None:
    """Refuse state that lacks a moment or has another shape."""
    shape = local(parameter).shape
    for name in rule.moments if saved else ():
        if name not in saved:
            raise ValueError(
                f"the state dict lacks {name!r} for a parameter of shape {tuple(shape)}; it has "
                f"{sorted(saved)}, so it comes from another update rule"
            )
        if local(saved[name]).shape != shape:
            raise ValueError(
                f"the state dict holds {name!r} of shape {tuple(local(saved[name]).shape)} for a "
                f"parameter of shape {tuple(shape)}"
            )


def check_thresholds(
    group: Mapping[str, Any], parameter: torch.Tensor, saved: Mapping[str, torch.Tensor]
) -> None:
    """Refuse thresholds that are not those of a group's row blocks."""
    expected = block_count(group)
    if THRESHOLD in saved and tuple(saved[THRESHOLD].shape) != (expected,):
        raise ValueError(
            f"the state dict holds thresholds of shape {tuple(saved[THRESHOLD].shape)} for a "
            f"parameter of shape {tuple(parameter.shape)} with {expected} row block(s)"
        )


def load_member(subgroup: SubgroupState, member: Member, saved: Mapping[str, torch.Tensor]) -> None:
    """Copy one parameter's state; what was never saved (no update yet) becomes zero."""
    subgroup.about_to_change()
    piece = slice(member.start, member.stop)
    for name in subgroup.layout.rule.moments:
        slab = subgroup.slabs[name][piece]
        if saved:
            slab.copy_(local(saved[name]).reshape(-1))
        else:
            slab.zero_()
    if member.threshold is not None:
        # What was not learnt there, under another policy for one, is learnt anew.
        learnt = saved.get(THRESHOLD, torch.zeros_like(member.threshold))
        member.threshold.copy_(learnt)
    member.step.fill_(float(saved["step"]) if "step" in saved else 0.0)
    weight = local(member.parameter).reshape(-1)
    if MASTER in saved:
        master = local(saved[MASTER]).reshape(-1)
    elif REMAINDER in saved:
        remainder = local(saved[REMAINDER]).reshape(-1)
        master = merge_master(weight.to(remainder.device), remainder)
    else:
        master = weight.to(torch.float32) if weight.itemsize < 4 else weight
    subgroup.set_master(member, master)
