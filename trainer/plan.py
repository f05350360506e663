"""What will happen: everything that follows from a recipe, computed once, by a pure function, and
printed.

`resolve` turns a `RunConfig` into a `Plan` for a number of ranks and a machine, without building a
model or reading a corpus. The training loop reads derived values from the plan only, and nothing
changes it.
"""

from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from interlace.offload.hardware import HardwareProfile, with_active_ranks
from interlace.offload.schedule import HiddenWindow, Schedule
from interlace.trainer.attention_choice import attention_backend
from interlace.trainer.capacity import DeviceMemory, Memory
from interlace.trainer.communication import Traffic, communication_seconds
from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.division import division_of, gathered_elements, share
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.cost import ForwardPass, idle_parameters, parameter_count
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.objectives import Accompanied, objective_of
from interlace.trainer.placement import (
    Circumstances,
    OffloadPlan,
    overlap_of,
    place,
    schedules,
    window_of,
)
from interlace.trainer.rules import rule_of

DEFAULT_MICROBATCH_TOKENS = 16_384

MOST_SUBGROUPS = 100_000
"""Subgroups of one rank; each costs a look at every step, and with so many the looks cost more than
the updates."""

USUAL_FLOPS_SHARE = 0.5
"""Share of the peak rate that training reaches, where no profile says it."""


@dataclass(frozen=True)
class Setting:
    """What a plan depends on besides the recipe.

    Attributes:
        world_size: Number of ranks.
        device_type: `cpu` or `cuda`.
        vocabulary_size: Entries of the tokenizer.
        corpus_tokens: Training tokens of the prepared corpus, or None while it is not prepared.
        hardware: One rank's share of the machine.
        ranks_per_host: Ranks that share it.
    """

    world_size: int
    device_type: str
    vocabulary_size: int
    corpus_tokens: int | None
    hardware: HardwareProfile
    ranks_per_host: int = 1


def on_ranks(alone: Setting, ranks: int) -> Setting:
    """Return the setting of so many ranks, given that of one rank that has the machine to itself.

    Ranks fill one node after another. On a CPU they share the cores of this host.
    """
    assert alone.world_size == 1, "what is divided must be whole"
    hardware = alone.hardware
    if alone.device_type == "cpu":
        rate = hardware.matmul_flops / ranks
        shared = hardware.model_copy(update={"matmul_flops": rate})
        return replace(alone, world_size=ranks, ranks_per_host=ranks, hardware=shared)
    per_node = hardware.rates.ranks_per_node if hardware.rates else ranks
    return replace(alone, world_size=ranks, ranks_per_host=min(ranks, per_node))


class Plan(BaseModel):
    """Everything derived from a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    device_type: str
    compute_dtype: str
    compiled: bool
    world_size: int
    ranks_per_host: int
    engine: str
    zero_stage: int | None
    replicas: int
    steps: int
    tokens_per_step: int
    total_tokens: int
    sequence_length: int
    rows_per_step: int
    microbatch_rows: int
    accumulation: int
    corpus_tokens: int | None
    epochs: float | None
    vocabulary_size: int
    parameters: int
    active_parameters: int
    forward_flops_per_token: int
    backward_flops_per_token: int
    total_flops: int
    memory: Memory
    offload: OffloadPlan
    device_memory_bytes: int
    host_memory_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    validations: int

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token, forward and backward."""
        return self.forward_flops_per_token + self.backward_flops_per_token


def resolve(config: RunConfig, setting: Setting) -> Plan:
    """Derive a plan.

    Raises:
        ConfigError: The recipe does not fit this number of ranks.
    """
    from interlace.trainer.parallel import compiles, compute_dtype_of

    train, size = config.train, setting.world_size
    objective = objective_of(config)
    if problems := objective.problems(config):
        raise ConfigError(problems)
    rows = train.tokens_per_step // config.data.sequence_length
    check_ranks(config, rows, size)
    check_subgroups(config, setting)
    microbatch = microbatch_rows(config, rows // size)
    dtype = compute_dtype_of(train, setting.device_type)
    parameters = objective.parameter_count(config, setting.vocabulary_size)
    flops = objective.flops_per_token(config, setting.vocabulary_size)
    total_tokens = train.steps * train.tokens_per_step
    tokens = setting.corpus_tokens
    facts = circumstances(config, setting, microbatch, rows // size // microbatch)
    placement = place(config, facts)
    return Plan(
        name=config.run.name,
        device_type=setting.device_type,
        compute_dtype=str(dtype).removeprefix("torch."),
        compiled=compiles(config, setting.device_type),
        world_size=size,
        ranks_per_host=setting.ranks_per_host,
        engine=config.parallel.engine,
        zero_stage=zero_stage(config),
        replicas=config.parallel.replicas,
        steps=train.steps,
        tokens_per_step=train.tokens_per_step,
        total_tokens=total_tokens,
        sequence_length=config.data.sequence_length,
        rows_per_step=rows,
        microbatch_rows=microbatch,
        accumulation=rows // size // microbatch,
        corpus_tokens=tokens,
        epochs=None if not tokens else total_tokens / tokens,
        vocabulary_size=setting.vocabulary_size,
        parameters=parameters,
        active_parameters=active_parameters(config, setting, parameters),
        forward_flops_per_token=flops.forward,
        backward_flops_per_token=flops.backward,
        total_flops=total_tokens * (flops.forward + flops.backward),
        memory=placement.memory,
        offload=placement,
        device_memory_bytes=setting.hardware.device_memory_bytes,
        host_memory_bytes=setting.hardware.host_memory_bytes,
        checkpoint_bytes=parameters * checkpoint_bytes_per_parameter(config),
        checkpoints=due_times(config.checkpoint.every_steps, train.steps),
        validations=due_times(train.validate_every_steps, train.steps),
    )


def active_parameters(config: RunConfig, setting: Setting, trained: int) -> int:
    """Return the trained parameters that one token meets; all of them where an objective trains a
    part of the model only, since what is idle may be in the other part.
    """
    whole = parameter_count(config.model, setting.vocabulary_size)
    return trained - idle_parameters(config.model) if trained == whole else trained


def check_ranks(config: RunConfig, rows: int, size: int) -> None:
    """Raise `ConfigError` unless the rows of a step and the replicas divide evenly over the
    ranks.
    """
    problems: list[str] = []
    if rows % size:
        whole = max(1, round(rows / size)) * size * config.data.sequence_length
        problems.append(
            f"train.tokens_per_step={config.train.tokens_per_step}: its {rows} rows of "
            f"data.sequence_length={config.data.sequence_length} do not split evenly over {size} "
            "ranks; "
            f"type train.tokens_per_step={whole}"
        )
    if size % config.parallel.replicas:
        choices = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        problems.append(
            f"parallel.replicas={config.parallel.replicas}: does not divide the {size} ranks of "
            "this run; "
            f"type one of parallel.replicas={choices}"
        )
    if problems:
        raise ConfigError(problems)


def check_subgroups(config: RunConfig, setting: Setting) -> None:
    """Raise `ConfigError` if subgroups are so small that a rank would have too many."""
    size, shard = config.offload.subgroup_elements, shard_size(config, setting)
    count = -(-shard // size)
    if count <= MOST_SUBGROUPS:
        return
    raise ConfigError(
        [
            f"offload.subgroup_elements={size}: would cut the {shard:,} parameters of a rank into "
            f"{count:,} subgroups, and handing over more than {MOST_SUBGROUPS:,} takes longer than "
            f"updating them; type offload.subgroup_elements={-(-shard // 1000)} or more"
        ]
    )


def microbatch_rows(config: RunConfig, rows_per_rank: int) -> int:
    """Return the most rows per pass that divide a rank's share and stay within the limit."""
    limit = config.train.microbatch_rows
    if limit is None:
        limit = max(1, DEFAULT_MICROBATCH_TOKENS // config.data.sequence_length)
    return max(n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0 and n <= limit)


def circumstances(
    config: RunConfig, setting: Setting, rows: int, accumulation: int
) -> Circumstances:
    """Return what the placement of optimizer state depends on."""
    from interlace.trainer.parallel import compute_dtype_of

    hardware = with_active_ranks(setting.hardware, setting.ranks_per_host)
    vocabulary = setting.vocabulary_size
    dtype = compute_dtype_of(config.train, setting.device_type)
    objective = objective_of(config)
    flops = objective.flops_per_token(config, vocabulary)
    share = hardware.rates.attainable_flops_share if hardware.rates else USUAL_FLOPS_SHARE
    per_second = hardware.matmul_flops * share
    tokens = rows * config.data.sequence_length
    again = 0 if config.train.activation_checkpointing == "none" else flops.forward
    traffic = Traffic(
        parameters=objective.parameter_count(config, vocabulary),
        element_bytes=dtype.itemsize,
        ranks=setting.world_size,
        ranks_per_host=setting.ranks_per_host,
        replicas=config.parallel.replicas,
        passes=accumulation,
        zero_stage=zero_stage(config),
    )
    return Circumstances(
        hardware=hardware,
        device_type=setting.device_type,
        ranks_per_host=setting.ranks_per_host,
        parameters=shard_size(config, setting),
        whole_parameters=traffic.parameters,
        division=division_of(config, setting.world_size),
        compute_dtype=dtype,
        microbatch_rows=rows,
        accumulation=accumulation,
        fixed=fixed_memory(config, setting, rows, dtype.itemsize),
        forward_seconds=tokens * flops.forward / per_second,
        backward_seconds=tokens * (flops.backward + again) / per_second,
        communication_seconds=communication_seconds(traffic, hardware.rates),
    )


def update_schedules(
    config: RunConfig, setting: Setting
) -> dict[str, tuple[Schedule, HiddenWindow]]:
    """Return the schedule of every strategy that fits, by name, and what hides it."""
    rows = config.train.tokens_per_step // config.data.sequence_length // setting.world_size
    microbatch = microbatch_rows(config, rows)
    facts = circumstances(config, setting, microbatch, rows // microbatch)
    return {
        strategy: (schedule, window_of(overlap_of(config, strategy), facts))
        for strategy, schedule in schedules(config, facts).items()
    }


def shard_size(config: RunConfig, setting: Setting) -> int:
    """Return the parameters whose state one rank has."""
    parameters = objective_of(config).parameter_count(config, setting.vocabulary_size)
    return share(parameters, division_of(config, setting.world_size).state)


def fixed_memory(
    config: RunConfig, setting: Setting, rows: int, element_bytes: int
) -> DeviceMemory:
    """Return the device memory of one rank that offloading does not change.

    Weights have the compute dtype; where they are divided among ranks, whole layers are gathered.
    """
    division = division_of(config, setting.world_size)
    layers = len(layer_patterns(config.model))
    whole = objective_of(config).parameter_count(config, setting.vocabulary_size)
    part = share(whole, division.weights)
    forward = ForwardPass(
        tokens=rows * config.data.sequence_length,
        sequence_length=config.data.sequence_length,
        bytes_per_element=element_bytes,
        checkpointing=config.train.activation_checkpointing,
    )
    # What is kept for backward depends on whose attention it is.
    backend = attention_backend(config, setting.device_type, rows)
    model = config.model.model_copy(update={"attention_backend": backend})
    return DeviceMemory(
        weights=element_bytes * part + untrained_bytes(config, setting, element_bytes),
        activations=objective_of(config).activation_bytes(
            config.model_copy(update={"model": model}), setting.vocabulary_size, forward
        ),
        gathered_weights=element_bytes * gathered_elements(config, division, whole, layers),
    )


def untrained_bytes(config: RunConfig, setting: Setting, element_bytes: int) -> int:
    """Return what weights that are not trained take on one rank, in bytes."""
    objective, vocabulary = objective_of(config), setting.vocabulary_size
    if not isinstance(objective, Accompanied):
        return 0
    shards = division_of(config, setting.world_size).weights
    return objective.untrained_bytes(config, vocabulary, shards, element_bytes)


def checkpoint_bytes_per_parameter(config: RunConfig) -> int:
    """Return what a checkpoint stores of one parameter: the fp32 master weight and the moments in
    their precision; a step count per tensor is not worth counting.
    """
    moment = 2 if config.offload.moments == "bfloat16" else 4
    return 4 + moment * len(rule_of(config).moments)


def zero_stage(config: RunConfig) -> int | None:
    """Return the stage of ZeRO, or None where another engine spreads the model."""
    return config.parallel.zero_stage if uses_zero(config) else None


def due_times(every: int, steps: int) -> int:
    """Return how often something due every so many steps, and at the end, happens."""
    return steps // every + (steps % every > 0) if every else 1
