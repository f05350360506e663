"""Which update rule a client optimizer means.

DeepSpeed is given an optimizer of torch, or makes one of its own, and lets it step over flat
partitions. An attached engine leaves that object where it is, with its groups and its state, and
makes the same update with a rule of `interlace.kernels.update`. What no rule means is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch

from interlace.kernels.update import SGD, AdamW, UpdateRule
from interlace.offload.deepspeed.names import Unserved

OURS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adamw": {"amsgrad": (False,), "maximize": (False,), "bias_correction": (True, 1)},
    "sgd": {"dampening": (0,), "maximize": (False,)},
}
"""Settings of parameter groups, by rule, and the values under which the rule is the same update."""


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the full name of an optimizer's class; a derived class may step in other ways."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def is_cpu_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is DeepSpeed's own, whose `step` is an int."""
    return kind_of(optimizer) == "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam"


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the rule that makes the same update as a client optimizer; hyperparameters are read
    from its groups at every step.

    Raises:
        Unserved: There is none.
    """
    groups = optimizer.param_groups
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) or is_cpu_adam(optimizer):
        if not getattr(optimizer, "fp32_optimizer_states", True):
            raise Unserved("DeepSpeedCPUAdam keeps its moments in 16 bits")
        rule: UpdateRule = AdamW()
    elif type(optimizer) is torch.optim.SGD:
        momenta = {bool(group["momentum"]) for group in groups}
        if len(momenta) > 1:
            raise Unserved("some parameter groups of SGD have momentum and others have none")
        rule = SGD(momentum=float(momenta.pop()))
    else:
        raise Unserved(
            f"the optimizer is {kind_of(optimizer)}; known are AdamW, Adam and SGD of torch.optim "
            "and DeepSpeedCPUAdam"
        )
    for group in groups:
        check_group(rule, optimizer, group)
    return rule


def check_group(
    rule: UpdateRule, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> None:
    """Raise `Unserved` if the settings of a parameter group mean another update than the rule."""
    for name, values in OURS[rule.name].items():
        if name in group and group[name] not in values:
            raise Unserved(f"a parameter group has {name}={group[name]!r}")
    if isinstance(rule, AdamW) and group["weight_decay"] and not decouples(optimizer, group):
        raise Unserved(
            f"Adam adds weight_decay={group['weight_decay']} to the gradient, and ours is "
            "decoupled: use AdamW"
        )


def decouples(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether an Adam shrinks weights by themselves instead of through the gradient."""
    if is_cpu_adam(optimizer):
        return bool(getattr(optimizer, "adam_w_mode", False))
    return bool(group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW))
