"""How a recipe scales, on paper: compute, communication and update on 1 to many devices.

The batch stays the recipe's, so more devices mean fewer passes each. Every row is the plan for so
many devices, so that table and sweep say the same; optimizer state is placed for every size anew:
the more devices, the more of it fits on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.plan import Plan, Setting, on_ranks, resolve


@dataclass(frozen=True)
class ScalingRow:
    """One number of devices; times in seconds per step.

    Attributes:
        gpus: Devices.
        problem: Why the recipe cannot run on so many, in a few words, or None.
        compute: Forward and backward.
        communication: Gathers and reduce-scatters, whether hidden or not.
        exposed_update: What compute does not hide of the update.
        step: The slower of compute and communication, and the exposed update.
        tokens_per_second: Of all devices.
        efficiency: Tokens per second and device against the smallest number that runs.
        device_bytes: Device memory of one rank.
        host_bytes: Optimizer state of one rank on the host.
    """

    gpus: int
    problem: str | None = None
    compute: float = 0.0
    communication: float = 0.0
    exposed_update: float = 0.0
    step: float = 0.0
    tokens_per_second: float = 0.0
    efficiency: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0


def sizes(first: int, last: int) -> list[int]:
    """Return `first`, doubled as long as it stays below `last`, and `last` itself."""
    found: list[int] = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def sweep(config: RunConfig, alone: Setting, counts: Sequence[int]) -> list[ScalingRow]:
    """Return one row for each number of devices; `alone` is the setting of a single one."""
    rows = [row_for(config, alone, gpus) for gpus in counts]
    base = next((row for row in rows if row.problem is None), None)
    return [
        row
        if base is None or row.problem
        else replace(
            row,
            efficiency=(row.tokens_per_second / row.gpus) / (base.tokens_per_second / base.gpus),
        )
        for row in rows
    ]


def row_for(config: RunConfig, alone: Setting, gpus: int) -> ScalingRow:
    """Return the row of one number of devices."""
    try:
        plan = resolve(config, on_ranks(alone, gpus))
    except ConfigError:
        return ScalingRow(gpus, problem=uneven(config, gpus))
    chosen = plan.offload.chosen
    assert chosen is not None, "the caller brings a profile with rates"
    if plan.offload.impossible:
        setting = plan.offload.impossible[0].partition(":")[0]
        return ScalingRow(gpus, problem=f"{setting} exceeds the machine's memory")
    if chosen.problem is not None:
        return ScalingRow(gpus, problem=chosen.shortage)
    return row_of(plan)


def uneven(config: RunConfig, gpus: int) -> str:
    """Say in a few words why a batch or replicas do not divide."""
    rows = config.train.tokens_per_step // config.data.sequence_length
    if rows % gpus:
        return f"the {rows:,} rows of a step do not split evenly"
    if gpus % config.parallel.replicas:
        return f"parallel.replicas={config.parallel.replicas} does not divide it"
    return f"offload.subgroup_elements={config.offload.subgroup_elements} is too small"


def row_of(plan: Plan) -> ScalingRow:
    """Return the row of a plan that fits."""
    chosen = plan.offload.chosen
    assert chosen is not None
    return ScalingRow(
        gpus=plan.world_size,
        compute=plan.offload.compute_seconds,
        communication=plan.offload.communication_seconds,
        exposed_update=chosen.exposed_seconds,
        step=chosen.step_seconds,
        tokens_per_second=plan.tokens_per_step / chosen.step_seconds,
        device_bytes=plan.memory.device.total,
        host_bytes=plan.memory.host.total,
    )
