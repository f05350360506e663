"""The offloading part of a plan: budgets, homes, and what every strategy would take, side by side.

A pure function of recipe and machine. The optimizer decides again with the model's real parameters;
here they are taken to fill subgroups evenly, which is the same but for the last one.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict

from interlace.offload.fit import memory_needs
from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import Overlap
from interlace.offload.performance_model import compare
from interlace.offload.schedule import (
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    MemoryShortage,
    Schedule,
    Subgroup,
)
from interlace.offload.subgroup import StateLayout
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.optimizer import rule_of

GIB = 2**30
DEVICE_RESERVE = 0.06
"""Share of device memory that nobody plans with: fragments, workspaces, the context."""

HOST_SHARE = 0.9
"""Share of a host's memory that state may occupy."""


class Forecast(BaseModel):
    """What one strategy would take, or why it cannot run.

    Attributes:
        problem: Why it does not fit, or None.
        resident, staged, host: Subgroups with each home.
        device_bytes: State, gradients and staging slots on the device.
        host_bytes: State and gradients on the host.
        update_seconds: From the first to the last event of an update.
        exposed_seconds: The part that no compute hides.
        step_seconds: Compute and exposed update.
        bound_by: The lane that decides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    strategy: str
    problem: str | None = None
    resident: int = 0
    staged: int = 0
    host: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    update_seconds: float = 0.0
    exposed_seconds: float = 0.0
    step_seconds: float = 0.0
    bound_by: str = ""


class OffloadPlan(BaseModel):
    """How optimizer state is placed.

    Attributes:
        strategy: As in the recipe.
        overlap: What updates run beside.
        device_budget_bytes: Device memory that state may occupy, per rank.
        host_budget_bytes: Host memory that state may occupy, per rank.
        hidden_window: Compute beside which updates may run, in seconds.
        compute_seconds: Forward and backward of one step.
        resident_bytes_per_parameter: State and gradient of a parameter that stays on the device.
        forecasts: One per strategy; empty while the machine's rates are unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    strategy: str
    overlap: Overlap
    device_budget_bytes: int
    host_budget_bytes: int
    hidden_window: HiddenWindow
    compute_seconds: float
    resident_bytes_per_parameter: int
    forecasts: tuple[Forecast, ...]

    @property
    def chosen(self) -> Forecast | None:
        """The forecast of the recipe's own strategy."""
        return next((f for f in self.forecasts if f.strategy == self.strategy), None)


@dataclass(frozen=True)
class Circumstances:
    """What placement depends on besides the recipe.

    Attributes:
        hardware: The machine; forecasts need its rates.
        device_type: `cpu` or `cuda`.
        host_memory_bytes: Memory of the host.
        ranks_per_host: Ranks that share it.
        parameters: Of one rank's shard.
        compute_dtype: Of weights and activations.
        accumulation: Backward passes per step.
        occupied_bytes: Device memory of weights, activations and copies, per rank.
        forward_seconds: One micro-batch.
        backward_seconds: One micro-batch.
    """

    hardware: HardwareProfile
    device_type: str
    host_memory_bytes: int
    ranks_per_host: int
    parameters: int
    compute_dtype: torch.dtype
    accumulation: int
    occupied_bytes: int
    forward_seconds: float
    backward_seconds: float


def place(config: RunConfig, facts: Circumstances) -> OffloadPlan:
    """Derive budgets, overlap and forecasts."""
    budget = budget_of(config, facts)
    overlap = overlap_of(config)
    window = window_of(overlap, facts)
    compute = (facts.forward_seconds + facts.backward_seconds) * facts.accumulation
    footprint = footprint_of(config, facts)
    outcomes = outcomes_of(config, facts)
    forecasts = [forecast(name, outcome, compute) for name, outcome in outcomes.items()]
    return OffloadPlan(
        strategy=config.offload.strategy,
        overlap=overlap,
        device_budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        hidden_window=window,
        compute_seconds=compute,
        resident_bytes_per_parameter=footprint.resident_memory,
        forecasts=tuple(forecasts),
    )


def budget_of(config: RunConfig, facts: Circumstances) -> MemoryBudget:
    """Return what state may occupy per rank: as asked, else what the rest leaves.

    Without a GPU the device's memory is the host's, and each gets half of what is free.
    """
    offload, hardware = config.offload, facts.hardware
    host = int(HOST_SHARE * facts.host_memory_bytes / facts.ranks_per_host)
    if facts.device_type == "cuda":
        usable = int((1 - DEVICE_RESERVE) * hardware.device_memory_bytes)
        device = max(0, usable - facts.occupied_bytes)
    else:
        device = max(0, host // 2 - facts.occupied_bytes)
        host //= 2
    if offload.device_budget_gib is not None:
        device = int(offload.device_budget_gib * GIB)
    if offload.host_budget_gib is not None:
        host = int(offload.host_budget_gib * GIB)
    return MemoryBudget(device, host)


def overlap_of(config: RunConfig) -> Overlap:
    """Return what updates run beside: as asked, else as much as stays exact."""
    offload = config.offload
    if offload.overlap != "auto":
        return offload.overlap
    if offload.strategy == "none":
        return "none"
    return "forward" if config.optimizer.clip else "backward"


def window_of(overlap: Overlap, facts: Circumstances) -> HiddenWindow:
    """Return the compute beside which an update may run: the next forward of one micro-batch, and
    the last backward where updates begin during it.
    """
    return HiddenWindow(
        backward=facts.backward_seconds if overlap == "backward" else 0.0,
        forward=facts.forward_seconds if overlap != "none" else 0.0,
        flush=facts.backward_seconds,
    )


def footprint_of(config: RunConfig, facts: Circumstances) -> Footprint:
    """Return bytes per parameter."""
    layout = StateLayout(
        rule_of(config.optimizer),
        getattr(torch, config.offload.moments),
        config.offload.split_master,
    )
    gradient = facts.compute_dtype if facts.accumulation == 1 else torch.float32
    return layout.footprint(facts.compute_dtype, gradient)


def subgroups_of(config: RunConfig, facts: Circumstances) -> list[Subgroup]:
    """Return one rank's parameters cut evenly."""
    footprint = footprint_of(config, facts)
    count = max(1, math.ceil(facts.parameters / config.offload.subgroup_elements))
    share, rest = divmod(facts.parameters, count)
    return [Subgroup(share + (number < rest), footprint) for number in range(count)]


def schedules(config: RunConfig, facts: Circumstances) -> dict[str, Schedule]:
    """Return the schedule of every strategy that fits."""
    outcomes = outcomes_of(config, facts)
    return {name: found for name, found in outcomes.items() if isinstance(found, Schedule)}


def outcomes_of(config: RunConfig, facts: Circumstances) -> dict[str, Schedule | MemoryShortage]:
    """Return every strategy's schedule, or why it does not fit; nothing without rates."""
    if facts.hardware.rates is None:
        return {}
    return compare(
        facts.hardware,
        subgroups_of(config, facts),
        budget_of(config, facts),
        window_of(overlap_of(config), facts),
        stride=config.offload.stride,
        staging_slots=config.offload.staging_slots,
    )


def forecast(strategy: str, outcome: Schedule | MemoryShortage, compute: float) -> Forecast:
    """Return what one strategy would take."""
    if isinstance(outcome, MemoryShortage):
        return Forecast(strategy=strategy, problem=str(outcome))
    needs = memory_needs(outcome.subgroups, outcome.homes, outcome.staging_slots)
    expected = outcome.prediction
    return Forecast(
        strategy=strategy,
        resident=outcome.homes.count(Home.RESIDENT),
        staged=outcome.homes.count(Home.STAGED),
        host=outcome.homes.count(Home.HOST),
        device_bytes=needs.device_bytes,
        host_bytes=needs.host_bytes,
        update_seconds=expected.update_seconds,
        exposed_seconds=expected.exposed_seconds,
        step_seconds=compute + expected.exposed_seconds,
        bound_by=expected.bound_by,
    )
