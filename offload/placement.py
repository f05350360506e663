"""Chooses a home for every subgroup: budgets first, then the performance model."""

from collections.abc import Sequence

import torch

from interlace.offload.fit import check_memory
from interlace.offload.hardware import HardwareProfile
from interlace.offload.memory import (
    HOST_SHARE,
    available_device_bytes,
    available_host_bytes,
    local_ranks,
)
from interlace.offload.options import OffloadOptions, Strategy
from interlace.offload.performance_model import fixed_homes, solve
from interlace.offload.schedule import Home, MemoryBudget, Schedule, Subgroup

DEVICE_SHARE = 0.5
"""Share of the free device memory that resident state may take when no budget is given: the
activations of the first forward pass are yet to come."""


def default_budget(device: torch.device, strategy: Strategy) -> MemoryBudget:
    """Return what state may occupy on this machine when nobody said it."""
    ranks = local_ranks()
    host = int(HOST_SHARE * available_host_bytes() / ranks)
    free = available_device_bytes(device) // (ranks if device.type == "cpu" else 1)
    share = 1.0 if strategy == "none" else DEVICE_SHARE
    return MemoryBudget(device_bytes=int(share * free), host_bytes=host)


def choose_schedule(
    subgroups: Sequence[Subgroup],
    *,
    profile: HardwareProfile | None,
    budget: MemoryBudget,
    strategy: Strategy,
    options: OffloadOptions,
) -> tuple[Schedule | None, tuple[Home, ...]]:
    """Return the schedule of all subgroups that have elements, and a home for every subgroup.

    Without a profile only strategies that need none are possible, and nothing is predicted.

    Raises:
        MemoryShortage: State does not fit the budget.
    """
    filled = [number for number, subgroup in enumerate(subgroups) if subgroup.elements]
    homes = [Home.RESIDENT] * len(subgroups)
    if not filled:
        return None, tuple(homes)
    shapes = [subgroups[number] for number in filled]
    if profile is None or profile.rates is None:
        fixed = fixed_homes(strategy, len(shapes), options.stride)
        assert fixed is not None, "a profile is measured where the strategy needs one"
        check_memory(shapes, fixed, budget, options.staging_slots, strategy)
        for number, home in zip(filled, fixed, strict=True):
            homes[number] = home
        return None, tuple(homes)
    schedule = solve(
        profile,
        shapes,
        budget,
        options.hidden_window,
        strategy=strategy,
        stride=options.stride,
        staging_slots=options.staging_slots,
    )
    for number, home in zip(filled, schedule.homes, strict=True):
        homes[number] = home
    return schedule, tuple(homes)
