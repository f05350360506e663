"""The optimizer of a run: what a recipe says of update rule and offloading, as an
`OffloadedOptimizer`.

Matrices decay, vectors (norms) do not; a model may give single parameters a rate of their own, and
muP gives every tensor its share of learning rate, decay, epsilon and threshold: parameters with the
same share are a group. With `offload.strategy = "none"` all state is on the device and the same
code updates it there: there is one path.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.offload.hardware import HardwareProfile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import MemoryBudget, MemoryShortage
from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import UNSCALED, Entry, Manifest
from interlace.trainer.mup.scaling import Factors
from interlace.trainer.rules import rule_of

if TYPE_CHECKING:
    from interlace.trainer.plan import Plan


def build_optimizer(
    model: nn.Module,
    config: RunConfig,
    plan: "Plan",
    profile: HardwareProfile,
    manifest: Manifest = UNSCALED,
) -> OffloadedOptimizer:
    """Return the optimizer over a model's parameters, on their device.

    Raises:
        ConfigError: Its state does not fit the memory.
    """
    offload = config.offload
    placement, rule = plan.offload, rule_of(config)
    try:
        return OffloadedOptimizer(
            parameter_groups(model, rule.hyperparameters(), manifest),
            rule,
            strategy=offload.strategy,
            budget=MemoryBudget(placement.device_budget_bytes, placement.host_budget_bytes),
            profile=profile,
            overlap=placement.overlap,
            clip_norm=largest_norm(config),
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


def parameter_groups(
    model: nn.Module, hyper: Mapping[str, Any], manifest: Manifest = UNSCALED
) -> list[dict[str, Any]]:
    """Return parameter groups: matrices, which decay, before vectors, which do not, each cut by
    what the manifest makes of the hyperparameters; and, without decay, what the model gives a
    learning rate of its own (`Model.rate_factors`).

    Args:
        model: Its parameters are named as in the manifest.
        hyper: Hyperparameters of the update rule at the base width.
        manifest: What muP makes of them.

    Returns:
        `lr` and what else the manifest scales, as they are for the group; `rate_factor`, the share
        of the learning rate that schedules keep; and where the rows of a tensor differ,
        `row_blocks` (see `interlace.offload.segments`).
    """
    rates = model.rate_factors if isinstance(model, Model) else {}
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    named = sorted(model.named_parameters(), key=lambda pair: (pair[0] in rates, pair[1].ndim < 2))
    for name, parameter in named:
        decays = parameter.ndim >= 2 and name not in rates
        entries = manifest.by_name.get(name, ())
        factors = [entry.factors for entry in entries] or [Factors()]
        blocks = row_blocks_of(entries) if len(entries) > 1 else ()
        shared = tuple((each.lr, each.weight_decay, each.eps, each.threshold) for each in factors)
        key = (name in rates, parameter.ndim >= 2, decays, rates.get(name, 1.0), shared, blocks)
        if key not in groups:
            groups[key] = group_of(hyper, factors[0], rates.get(name, 1.0), decays=decays)
            groups[key] |= {"row_blocks": [dict(block) for block in blocks]} if blocks else {}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def group_of(
    hyper: Mapping[str, Any], factors: Factors, own_rate: float, *, decays: bool
) -> dict[str, Any]:
    """Return a group without parameters: what the factors make of the hyperparameters."""
    scaled = {
        name: hyper[name] * getattr(factors, name)
        for name in ("weight_decay", "eps", "threshold")
        if name in hyper
    }
    if not decays and "weight_decay" in scaled:
        scaled["weight_decay"] = 0.0
    rate = own_rate * factors.lr
    return {"params": [], "lr": hyper["lr"] * rate, "rate_factor": rate, **scaled}


def row_blocks_of(entries: Sequence[Entry]) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return rows and factors, against those of the first, of every block of rows."""
    first = entries[0].factors
    return tuple(
        (
            ("rows", entry.shape[0]),
            ("lr", entry.factors.lr / first.lr),
            ("weight_decay", entry.factors.weight_decay / first.weight_decay),
            ("eps", entry.factors.eps / first.eps),
            ("threshold", entry.factors.threshold / first.threshold),
        )
        for entry in entries
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate of this step, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def check_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Raise unless every parameter group still has its share of the learning rate: a scheduler that
    overwrites groups with one rate (DeepSpeed's `WarmupLR` does) undoes muP without a word.

    Raises:
        ValueError: It names the first group that has another rate.
    """
    for number, group in enumerate(optimizer.param_groups):
        wanted = rate * group.get("rate_factor", 1.0)
        if not math.isclose(float(group["lr"]), wanted, rel_tol=1e-6):
            raise ValueError(
                f"parameter group {number} has the learning rate {float(group['lr']):g}, and its "
                f"share {group.get('rate_factor', 1.0):g} of {rate:g} is {wanted:g}: something "
                "overwrites the rates of groups; schedule by scaling each group's own rate "
                "(torch's LambdaLR does), or with set_learning_rate"
            )
