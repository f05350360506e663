"""Which of DeepSpeed's settings a recipe decides, and what to type into it for another value."""

from collections.abc import Callable
from typing import Any

from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines.zero.merging import Decision
from interlace.trainer.plan import Plan

OFFLOAD = "zero_optimization.offload_optimizer"

Instead = Callable[[Any], str]


def decisions_of(config: RunConfig, plan: Plan) -> dict[str, Decision]:
    """Return what a recipe decides, by path, for the ranks of a plan."""
    size, stage = config.offload.subgroup_elements, config.parallel.zero_stage
    home = "none" if config.offload.strategy == "none" else "cpu"
    batch = f"train.tokens_per_step={plan.tokens_per_step} in rows of {plan.sequence_length}"
    rows_per_rank = plan.rows_per_step // plan.world_size
    passes = f"{rows_per_rank} rows of each rank in passes of {plan.microbatch_rows}"
    dtype = f"train.compute_dtype={config.train.compute_dtype} on this device"
    return {
        "train_batch_size": Decision(plan.rows_per_step, batch, batch_of(plan.sequence_length)),
        "train_micro_batch_size_per_gpu": Decision(
            plan.microbatch_rows, passes, counted("train.microbatch_rows")
        ),
        "gradient_accumulation_steps": Decision(
            plan.accumulation, passes, passes_of(rows_per_rank)
        ),
        "gradient_clipping": Decision(largest_norm(config) or 0.0, "optimizer.clip", clip_of),
        "bf16.enabled": Decision(plan.compute_dtype == "bfloat16", dtype, dtype_of),
        "zero_optimization.stage": Decision(stage, f"parallel.zero_stage={stage}", stage_of),
        "zero_optimization.sub_group_size": Decision(
            size, f"offload.subgroup_elements={size}", counted("offload.subgroup_elements")
        ),
        f"{OFFLOAD}.device": Decision(home, f"offload.strategy={config.offload.strategy}", home_of),
    }


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number from 1 on; `1e9` is one."""
    return is_number(value) and value >= 1 and value == int(value)


def counted(key: str) -> Instead:
    """Return what types the same count under a key of the recipe."""
    return lambda value: f"{key}={int(value)}" if is_count(value) else ""


def batch_of(sequence_length: int) -> Instead:
    """Return what types another batch of rows."""

    def typed(value: Any) -> str:
        good = is_count(value)
        return f"train.tokens_per_step={int(value) * sequence_length}" if good else ""

    return typed


def passes_of(rows: int) -> Instead:
    """Return what types another number of passes through the rows of one rank."""

    def typed(value: Any) -> str:
        good = is_count(value) and rows % int(value) == 0
        return f"train.microbatch_rows={rows // int(value)}" if good else ""

    return typed


def clip_of(value: Any) -> str:
    """Type another largest norm."""
    return f"optimizer.clip={value}" if is_number(value) and value >= 0 else ""


def dtype_of(value: Any) -> str:
    """Type another precision."""
    dtypes = {True: "bfloat16", False: "float32"}
    return f"train.compute_dtype={dtypes[value]}" if isinstance(value, bool) else ""


def stage_of(value: Any) -> str:
    """Type another stage."""
    return f"parallel.zero_stage={int(value)}" if is_count(value) and value <= 3 else ""


def home_of(value: Any) -> str:
    """Type a strategy that has state there."""
    strategies = {"cpu": "optimal", "none": "none"}
    known = isinstance(value, str) and value in strategies
    return f"offload.strategy={strategies[value]}" if known else ""
