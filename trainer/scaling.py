"""How a recipe scales, on paper: compute, communication and update on 1 to many devices.

The batch stays the recipe's, so more devices mean fewer passes each. FSDP2's traffic per pass is
two gathers of the weights and one reduce-scatter of gradients; inside a node at the node's
collective rate, across nodes at the network's, beside compute. Optimizer state is placed for every
size anew: the more devices, the more of it fits on them.
"""

from dataclasses import dataclass, replace

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.plan import Plan, Setting, resolve


@dataclass(frozen=True)
class ScalingRow:
    """One number of devices; times in seconds per step.

    Attributes:
        gpus: Devices.
        problem: Why the recipe cannot run on so many, or None.
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


def sweep(config: RunConfig, setting: Setting, first: int, last: int) -> list[ScalingRow]:
    """Return one row for every power of two from `first` to `last` devices."""
    rows: list[ScalingRow] = []
    gpus = first
    while gpus <= last:
        rows.append(row_for(config, setting, gpus))
        gpus *= 2
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


def row_for(config: RunConfig, setting: Setting, gpus: int) -> ScalingRow:
    """Return the row of one number of devices."""
    rates = setting.hardware.rates
    assert rates is not None, "the caller brings a profile with rates"
    here = replace(setting, world_size=gpus, ranks_per_host=min(gpus, rates.ranks_per_node))
    try:
        plan = resolve(config, here)
    except ConfigError as error:
        return ScalingRow(gpus, problem=str(error).splitlines()[0])
    chosen = plan.offload.chosen
    if chosen is None or chosen.problem is not None:
        return ScalingRow(gpus, problem=chosen.problem if chosen else "no rates")
    if plan.memory.total > plan.device_memory_bytes:
        return ScalingRow(
            gpus, problem="weights and activations exceed device memory; more GPUs or smaller rows"
        )
    communication = plan.accumulation * communication_seconds(plan, gpus, setting)
    step = max(plan.offload.compute_seconds, communication) + chosen.exposed_seconds
    return ScalingRow(
        gpus=gpus,
        compute=plan.offload.compute_seconds,
        communication=communication,
        exposed_update=chosen.exposed_seconds,
        step=step,
        tokens_per_second=plan.tokens_per_step / step,
        device_bytes=plan.memory.total,
        host_bytes=plan.memory.host_optimizer_state,
    )


def communication_seconds(plan: Plan, gpus: int, setting: Setting) -> float:
    """Return the seconds of one pass' collectives: a ring receives all but its own share, over the
    slowest link on its way.
    """
    rates = setting.hardware.rates
    assert rates is not None
    if gpus == 1:
        return 0.0
    shards = gpus // plan.replicas
    within = gpus <= rates.ranks_per_node
    rate = rates.collective_bytes_per_second if within else rates.network_bytes_per_second
    element = 4 if plan.compute_dtype == "float32" else 2
    weights = element * plan.parameters * (shards - 1) / shards
    # Gradients are reduced in float32.
    gradients = 4 * plan.parameters * (gpus - 1) / gpus
    return (2 * weights + gradients) / rate
