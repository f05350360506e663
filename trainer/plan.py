"""What will happen: everything that follows from a recipe, computed once, by a pure function, and
printed.

`resolve` turns a `RunConfig` into a `Plan` for a number of ranks and a machine, without building a
model or reading a corpus. The training loop reads derived values from the plan only, and nothing
changes it.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.cost import (
    ForwardPass,
    activation_bytes,
    flops_per_token,
    parameter_count,
)

DEFAULT_MICROBATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Setting:
    """What a plan depends on besides the recipe.

    Attributes:
        world_size: Number of ranks.
        device_type: `cpu` or `cuda`.
        vocabulary_size: Entries of the tokenizer.
        corpus_tokens: Training tokens of the prepared corpus, or None while it is not prepared.
        device_memory_bytes: Memory of one rank's device.
        host_memory_bytes: Memory of the host.
    """

    world_size: int
    device_type: str
    vocabulary_size: int
    corpus_tokens: int | None
    device_memory_bytes: int
    host_memory_bytes: int


class Memory(BaseModel):
    """Bytes of one rank's device by kind, at the peak of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: int
    gradients: int
    optimizer_moments: int
    activations: int
    compute_copies: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return (
            self.weights
            + self.gradients
            + self.optimizer_moments
            + self.activations
            + self.compute_copies
        )


class Plan(BaseModel):
    """Everything derived from a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    device_type: str
    compute_dtype: str
    compiled: bool
    world_size: int
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
    forward_flops_per_token: int
    backward_flops_per_token: int
    total_flops: int
    memory: Memory
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
    rows = train.tokens_per_step // config.data.sequence_length
    check_ranks(config, rows, size)
    microbatch = microbatch_rows(config, rows // size)
    dtype = compute_dtype_of(train, setting.device_type)
    parameters = parameter_count(config.model, setting.vocabulary_size)
    flops = flops_per_token(config.model, setting.vocabulary_size, config.data.sequence_length)
    total_tokens = train.steps * train.tokens_per_step
    tokens = setting.corpus_tokens
    return Plan(
        name=config.run.name,
        device_type=setting.device_type,
        compute_dtype=str(dtype).removeprefix("torch."),
        compiled=compiles(train, setting.device_type),
        world_size=size,
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
        forward_flops_per_token=flops.forward,
        backward_flops_per_token=flops.backward,
        total_flops=total_tokens * (flops.forward + flops.backward),
        memory=memory_of(config, setting, microbatch, dtype.itemsize),
        device_memory_bytes=setting.device_memory_bytes,
        host_memory_bytes=setting.host_memory_bytes,
        checkpoint_bytes=12 * parameters,
        checkpoints=due_times(config.checkpoint.every_steps, train.steps),
        validations=due_times(train.validate_every_steps, train.steps),
    )


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


def microbatch_rows(config: RunConfig, rows_per_rank: int) -> int:
    """Return the most rows per pass that divide a rank's share and stay within the limit."""
    limit = config.train.microbatch_rows
    if limit is None:
        limit = max(1, DEFAULT_MICROBATCH_TOKENS // config.data.sequence_length)
    return max(n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0 and n <= limit)


def memory_of(config: RunConfig, setting: Setting, rows: int, element_bytes: int) -> Memory:
    """Return the device memory of one rank by kind, in bytes.

    Weights, gradients and both moments are fp32 and sharded over the ranks of one replica; below
    fp32 the backward pass also holds one cast copy of every matrix.
    """
    shards = setting.world_size // config.parallel.replicas
    parameters = parameter_count(config.model, setting.vocabulary_size)
    per_rank = 4 * -(-parameters // shards)
    forward = ForwardPass(
        tokens=rows * config.data.sequence_length,
        sequence_length=config.data.sequence_length,
        bytes_per_element=element_bytes,
        checkpointing=config.train.activation_checkpointing,
    )
    return Memory(
        weights=per_rank,
        gradients=per_rank,
        optimizer_moments=2 * per_rank,
        activations=activation_bytes(config.model, setting.vocabulary_size, forward),
        compute_copies=0 if element_bytes == 4 else element_bytes * parameters,
    )


def due_times(every: int, steps: int) -> int:
    """Return how often something due every so many steps, and at the end, happens."""
    return steps // every + (steps % every > 0) if every else 1
