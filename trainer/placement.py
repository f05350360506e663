"""The offloading part of a plan: budgets, homes, and what every strategy would take, side by side.

A pure function of recipe and machine. The optimizer decides again with the model's real parameters;
here they are taken to fill subgroups evenly, which is the same but for the last one. Every strategy
is predicted under the overlap and the budgets that it would get if the recipe asked for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict

from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import Overlap
from interlace.offload.performance_model import (
    STRATEGIES,
    fill_device,
    fixed_homes,
    published_stride,
    solve,
)
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
from interlace.trainer.capacity import (
    GIB,
    Demand,
    DeviceMemory,
    HostMemory,
    Memory,
    Room,
    Shortage,
    budget_problems,
    memory_by_kind,
    room_of,
    shortage_of,
)
from interlace.trainer.config.clip_checks import clips_coordinates, waits_for_all_gradients
from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.division import Division, buffers_of
from interlace.trainer.rules import rule_of


class HomeShare(BaseModel):
    """What has one home.

    Attributes:
        subgroups: How many.
        parameters: Of all of them.
        bytes: Master weights and moments, as they are kept there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    subgroups: int = 0
    parameters: int = 0
    bytes: int = 0


class Forecast(BaseModel):
    """What one strategy would take, or why it cannot run.

    Attributes:
        overlap: What its updates would run beside.
        problem: Why it does not fit and what to type, or None.
        shortage: The same in a few words.
        homes: Subgroups, parameters and bytes with each home.
        device_bytes: State, gradients and staging slots on the device.
        host_bytes: State and gradients on the host.
        update_seconds: From the first to the last event of an update.
        exposed_seconds: The part that no compute hides.
        step_seconds: The slower of compute and communication, and the exposed update.
        bound_by: The lane that decides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    strategy: str
    overlap: Overlap
    problem: str | None = None
    shortage: str | None = None
    homes: dict[str, HomeShare] = {}
    device_bytes: int = 0
    host_bytes: int = 0
    update_seconds: float = 0.0
    exposed_seconds: float = 0.0
    step_seconds: float = 0.0
    bound_by: str = ""


class Reference(BaseModel):
    """What AdamW would take in place of the recipe's rule.

    Attributes:
        moment_bytes: Of one parameter.
        overlap: What its updates would run beside.
        update_seconds: From the first to the last event of an update; None without rates, or where
            its state does not fit.
        exposed_seconds: The part that no compute hides; likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    moment_bytes: int
    overlap: Overlap
    update_seconds: float | None
    exposed_seconds: float | None


class OffloadPlan(BaseModel):
    """How optimizer state is placed.

    Attributes:
        strategy: As in the recipe.
        overlap: What updates run beside.
        device_budget_bytes: Device memory that state may occupy, per rank.
        host_budget_bytes: Host memory that state may occupy, per rank.
        hidden_window: Compute beside which updates may run, in seconds.
        compute_seconds: Forward and backward of one step.
        communication_seconds: Collectives of one step, hidden beside compute or not.
        memory: Of the recipe's own strategy, by kind.
        impossible: Budgets of the recipe that this machine does not have.
        problem: Why the recipe's own strategy does not fit and what to type, or None.
        shortage: The same in a few words.
        forecasts: One per strategy; empty while the machine's rates are unknown.
        moment_bytes: Of one parameter.
        reference: AdamW beside it, where the rule is another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    strategy: str
    overlap: Overlap
    device_budget_bytes: int
    host_budget_bytes: int
    hidden_window: HiddenWindow
    compute_seconds: float
    communication_seconds: float
    memory: Memory
    impossible: tuple[str, ...]
    problem: str | None
    shortage: str | None
    forecasts: tuple[Forecast, ...]
    moment_bytes: int
    reference: Reference | None

    @property
    def chosen(self) -> Forecast | None:
        """The forecast of the recipe's own strategy."""
        return next((f for f in self.forecasts if f.strategy == self.strategy), None)


@dataclass(frozen=True)
class Circumstances:
    """What placement depends on besides the recipe.

    Attributes:
        hardware: One rank's share of the machine; forecasts need its rates.
        device_type: `cpu` or `cuda`.
        ranks_per_host: Ranks that share a host.
        parameters: Of one rank's shard.
        whole_parameters: Of the model.
        division: Among how many ranks it is divided.
        compute_dtype: Of weights and activations.
        microbatch_rows: Rows of one pass.
        accumulation: Backward passes per step.
        fixed: Device memory of weights, activations and gathered layers, per rank.
        forward_seconds: One micro-batch.
        backward_seconds: One micro-batch.
        communication_seconds: Collectives of one step.
    """

    hardware: HardwareProfile
    device_type: str
    ranks_per_host: int
    parameters: int
    whole_parameters: int
    division: Division
    compute_dtype: torch.dtype
    microbatch_rows: int
    accumulation: int
    fixed: DeviceMemory
    forward_seconds: float
    backward_seconds: float
    communication_seconds: float

    @property
    def room(self) -> Room:
        """The memory that one rank may fill."""
        return room_of(self.hardware, self.device_type, self.ranks_per_host)

    @property
    def compute_seconds(self) -> float:
        """Forward and backward of one step."""
        return (self.forward_seconds + self.backward_seconds) * self.accumulation


@dataclass(frozen=True)
class Outcome:
    """What placing one strategy's state came to.

    Attributes:
        overlap: What its updates run beside.
        homes: A home for every subgroup; where none fit, those that need least.
        memory: What these need.
        schedule: With predicted times; None without rates, or where nothing fits.
        shortage: Why it does not fit, or None.
    """

    overlap: Overlap
    homes: tuple[Home, ...]
    memory: Memory
    schedule: Schedule | None
    shortage: Shortage | None


def place(config: RunConfig, facts: Circumstances) -> OffloadPlan:
    """Derive budgets, overlap and forecasts."""
    offload = config.offload
    strategy = offload.strategy
    budget = budget_of(config, facts, strategy)
    overlap = overlap_of(config, strategy)
    outcomes = outcomes_of(config, facts)
    own = outcomes.get(strategy) or outcome_of(config, facts, strategy)
    return OffloadPlan(
        strategy=strategy,
        overlap=overlap,
        device_budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        hidden_window=window_of(overlap, facts),
        compute_seconds=facts.compute_seconds,
        communication_seconds=facts.communication_seconds,
        memory=own.memory,
        impossible=tuple(
            budget_problems(offload.device_budget_gib, offload.host_budget_gib, facts.room)
        ),
        problem=own.shortage.long if own.shortage else None,
        shortage=own.shortage.short if own.shortage else None,
        forecasts=tuple(forecast(name, outcomes[name], facts) for name in outcomes),
        moment_bytes=moment_bytes(config),
        reference=reference_of(config, facts),
    )


def reference_of(config: RunConfig, facts: Circumstances) -> Reference | None:
    """Return what AdamW would take with the recipe's other settings; None where it is the rule."""
    if config.optimizer.rule == "adamw" and not clips_coordinates(config):
        return None
    offload, plain = config.offload, config.coordinate_clip.model_copy(update={"stage": "none"})
    if offload.overlap == "backward":
        # As much as stays exact: it waits for the norm, where it clips by it.
        offload = offload.model_copy(update={"overlap": "auto"})
    adamw = config.optimizer.model_copy(update={"rule": "adamw", "nesterov": False})
    changes = {"optimizer": adamw, "coordinate_clip": plain, "offload": offload}
    twin = config.model_copy(update=changes)
    outcome = outcome_of(twin, facts, offload.strategy)
    fits = outcome.shortage is None and outcome.schedule is not None
    expected = outcome.schedule.prediction if fits and outcome.schedule else None
    return Reference(
        moment_bytes=moment_bytes(twin),
        overlap=outcome.overlap,
        update_seconds=expected.update_seconds if expected else None,
        exposed_seconds=expected.exposed_seconds if expected else None,
    )


def budget_of(config: RunConfig, facts: Circumstances, strategy: str) -> MemoryBudget:
    """Return what state may occupy per rank: as asked, as far as the machine has it, else what the
    rest leaves.

    Without a GPU the device's memory is the host's. A strategy that chooses freely gets half of it
    for each, since every byte can be used once only.
    """
    offload, room = config.offload, facts.room
    fixed = fixed_under(config, facts, strategy)
    device, host = room.device_bytes - fixed.device.total, room.host_bytes - fixed.host.total
    if room.shared and strategy == "optimal":
        half = room.host_bytes // 2
        device, host = half - fixed.device.total, half - fixed.host.total
    if offload.device_budget_gib is not None:
        device = min(int(offload.device_budget_gib * GIB), room.device_bytes)
    if offload.host_budget_gib is not None:
        host = min(int(offload.host_budget_gib * GIB), room.host_bytes)
    return MemoryBudget(max(0, device), max(0, host))


def fixed_under(config: RunConfig, facts: Circumstances, strategy: str) -> Memory:
    """Return what homes do not change of a rank's memory: weights, activations, buffers."""
    buffers = buffers_of(
        config,
        facts.division,
        facts.whole_parameters,
        facts.compute_dtype.itemsize,
        offloads=strategy != "none",
    )
    return Memory(
        device=facts.fixed.model_copy(update={"engine_buffers": buffers.device}),
        host=HostMemory(engine_buffers=buffers.host),
    )


def overlap_of(config: RunConfig, strategy: str) -> Overlap:
    """Return what updates of a strategy run beside: as asked, else as much as stays exact; nothing
    under ZeRO, which begins and ends them in its step.
    """
    offload = config.offload
    if offload.overlap != "auto":
        return offload.overlap
    if strategy == "none" or uses_zero(config):
        return "none"
    return "forward" if waits_for_all_gradients(config) else "backward"


def window_of(overlap: Overlap, facts: Circumstances) -> HiddenWindow:
    """Return the compute beside which an update may run: the next forward of one micro-batch, and
    the last backward where updates begin during it.
    """
    return HiddenWindow(
        backward=facts.backward_seconds if overlap == "backward" else 0.0,
        forward=facts.forward_seconds if overlap != "none" else 0.0,
        flush=facts.backward_seconds,
    )


def layout_of(config: RunConfig) -> StateLayout:
    """Return in which precision state is kept; that of ZeRO is DeepSpeed's."""
    if uses_zero(config):
        return StateLayout(rule_of(config), sums_gradients=True, lent=True)
    return StateLayout(
        rule_of(config),
        getattr(torch, config.offload.moments),
        config.offload.split_master,
    )


def footprint_of(config: RunConfig, facts: Circumstances) -> Footprint:
    """Return bytes per parameter."""
    layout = layout_of(config)
    one_pass = facts.accumulation == 1 and not layout.lent
    gradient = facts.compute_dtype if one_pass else torch.float32
    return layout.footprint(facts.compute_dtype, gradient)


def moment_bytes(config: RunConfig) -> int:
    """Return the bytes of all moments of one parameter."""
    layout = layout_of(config)
    return len(layout.rule.moments) * layout.moment_dtype.itemsize


def subgroups_of(config: RunConfig, facts: Circumstances) -> list[Subgroup]:
    """Return one rank's parameters cut evenly."""
    footprint = footprint_of(config, facts)
    count = max(1, math.ceil(facts.parameters / config.offload.subgroup_elements))
    share, rest = divmod(facts.parameters, count)
    return [Subgroup(share + (number < rest), footprint) for number in range(count)]


def schedules(config: RunConfig, facts: Circumstances) -> dict[str, Schedule]:
    """Return the schedule of every strategy that fits."""
    outcomes = outcomes_of(config, facts)
    return {
        name: found.schedule
        for name, found in outcomes.items()
        if found.schedule is not None and found.shortage is None
    }


def outcomes_of(config: RunConfig, facts: Circumstances) -> dict[str, Outcome]:
    """Return what every strategy comes to; nothing without rates."""
    if facts.hardware.rates is None:
        return {}
    return {strategy: outcome_of(config, facts, strategy) for strategy in STRATEGIES}


def outcome_of(config: RunConfig, facts: Circumstances, strategy: str) -> Outcome:
    """Return what one strategy comes to."""
    subgroups = subgroups_of(config, facts)
    overlap = overlap_of(config, strategy)
    budget = budget_of(config, facts, strategy)
    window = window_of(overlap, facts)
    schedule, refusal = None, None
    if facts.hardware.rates is not None:
        try:
            schedule = solve(
                facts.hardware,
                subgroups,
                budget,
                window,
                strategy=strategy,
                stride=config.offload.stride,
                staging_slots=config.offload.staging_slots,
            )
        except MemoryShortage as error:
            refusal = Shortage("does not fit its budgets", str(error))
    homes = schedule.homes if schedule else least_homes(config, facts, strategy, subgroups, budget)
    slots = config.offload.staging_slots
    fixed = fixed_under(config, facts, strategy)
    memory = memory_by_kind(fixed, subgroups, homes, slots, moment_bytes(config))
    shortage = shortage_of(demand_of(config, facts, strategy, memory), facts.room) or refusal
    return Outcome(overlap, homes, memory, schedule, shortage)


def least_homes(
    config: RunConfig,
    facts: Circumstances,
    strategy: str,
    subgroups: Sequence[Subgroup],
    budget: MemoryBudget,
) -> tuple[Home, ...]:
    """Return the homes by which a shortage is measured: those of the strategy, or, where it is free
    to choose, as many resident ones as the device's budget holds.
    """
    stride = config.offload.stride
    if strategy == "optimal":
        if facts.hardware.rates is None:
            return (Home.RESIDENT,) * len(subgroups)
        return tuple(fill_device(subgroups, [Home.HOST] * len(subgroups), budget.device_bytes))
    if strategy == "stride" and stride is None:
        known = facts.hardware.rates is not None
        stride = published_stride(facts.hardware, subgroups[0].footprint) if known else 2
    homes = fixed_homes(strategy, len(subgroups), stride)
    assert homes is not None, "every other strategy is fixed"
    return tuple(homes)


def demand_of(config: RunConfig, facts: Circumstances, strategy: str, memory: Memory) -> Demand:
    """Return what a strategy needs and what may be changed to lower it."""
    offload = config.offload
    budget = budget_of(config, facts, strategy)
    return Demand(
        strategy=strategy,
        memory=memory,
        device_budget=None if offload.device_budget_gib is None else budget.device_bytes,
        host_budget=None if offload.host_budget_gib is None else budget.host_bytes,
        microbatch_rows=facts.microbatch_rows,
        checkpointing=config.train.activation_checkpointing,
        halves_moments=offload.moments != "bfloat16" and not uses_zero(config),
        more_ranks=facts.division.remedy,
    )


def forecast(strategy: str, outcome: Outcome, facts: Circumstances) -> Forecast:
    """Return what one strategy would take."""
    shortage, schedule = outcome.shortage, outcome.schedule
    if shortage is not None or schedule is None:
        return Forecast(
            strategy=strategy,
            overlap=outcome.overlap,
            problem=shortage.long if shortage else None,
            shortage=shortage.short if shortage else None,
        )
    expected = schedule.prediction
    slowest = max(facts.compute_seconds, facts.communication_seconds)
    return Forecast(
        strategy=strategy,
        overlap=outcome.overlap,
        homes={home.value: home_share(schedule, home) for home in Home},
        device_bytes=outcome.memory.device.state,
        host_bytes=outcome.memory.host.total,
        update_seconds=expected.update_seconds,
        exposed_seconds=expected.exposed_seconds,
        step_seconds=slowest + expected.exposed_seconds,
        bound_by=expected.bound_by,
    )


def home_share(schedule: Schedule, home: Home) -> HomeShare:
    """Return what has one home."""
    members = [
        subgroup
        for subgroup, where in zip(schedule.subgroups, schedule.homes, strict=True)
        if where is home
    ]
    kept = [
        subgroup.footprint.state if home is Home.HOST else subgroup.footprint.staged_copy
        for subgroup in members
    ]
    return HomeShare(
        subgroups=len(members),
        parameters=sum(subgroup.elements for subgroup in members),
        bytes=sum(s.elements * size for s, size in zip(members, kept, strict=True)),
    )
