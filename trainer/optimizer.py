"""The optimizer of a run: what a recipe says of update rule and offloading, as an
`OffloadedOptimizer`.

Matrices decay, vectors (norms) do not; a model may give single parameters a rate of their own. With
`offload.strategy = "none"` all state is on the device and the same code updates it there: there is
one path.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from interlace.offload.hardware import HardwareProfile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import MemoryBudget, MemoryShortage
from interlace.trainer.config.schema import OptimizerSection, RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.rules import rule_of

if TYPE_CHECKING:
    from interlace.trainer.plan import Plan


def build_optimizer(
    model: nn.Module, config: RunConfig, plan: "Plan", profile: HardwareProfile
) -> OffloadedOptimizer:
    """Return the optimizer over a model's parameters, on their device.

    Raises:
        ConfigError: Its state does not fit the memory.
    """
    settings, offload = config.optimizer, config.offload
    placement = plan.offload
    try:
        return OffloadedOptimizer(
            parameter_groups(model, settings),
            rule_of(settings),
            strategy=offload.strategy,
            budget=MemoryBudget(placement.device_budget_bytes, placement.host_budget_bytes),
            profile=profile,
            overlap=placement.overlap,
            clip_norm=settings.clip or None,
            model=model,
            options=OffloadOptions(
                stride=offload.stride,
                subgroup_elements=offload.subgroup_elements,
                staging_slots=offload.staging_slots,
                moment_dtype=getattr(torch, offload.moments),
                split_master=offload.split_master,
                accumulation_steps=plan.accumulation,
                hidden_window=placement.hidden_window,
                cpu_threads=offload.cpu_threads,
                recalibrate=offload.recalibrate and offload.strategy == "optimal",
            ),
        )
    except MemoryShortage as error:
        raise ConfigError([str(error)]) from error


def parameter_groups(model: nn.Module, settings: OptimizerSection) -> list[dict[str, object]]:
    """Return matrices, which decay, and vectors, which do not; and, each in a group of its own and
    without decay, what the model gives a learning rate of its own (`Model.rate_factors`).
    """
    factors = model.rate_factors if isinstance(model, Model) else {}
    named = [(name, each) for name, each in model.named_parameters() if name not in factors]
    groups: list[dict[str, object]] = [
        {
            "params": [parameter for _, parameter in named if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for _, parameter in named if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    for name, factor in factors.items():
        own: dict[str, object] = {"params": [model.get_parameter(name)], "rate_factor": factor}
        groups.append(own | {"weight_decay": 0.0})
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate of this step, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
