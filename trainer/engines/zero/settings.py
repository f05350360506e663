"""The JSON of DeepSpeed that a recipe means.

Batch, accumulation, clipping, precision, stage and where optimizer state lies follow from the
recipe and its plan, and nobody types them twice. Gradients are reduced and summed in float32
whatever the compute dtype, as with FSDP2: DeepSpeed by itself does both in bfloat16 where weights
have it. What DeepSpeed would print or time is off, since the loop does so. DeepSpeed itself is not
loaded here. Reference: https://www.deepspeed.ai/docs/config-json/ and `deepspeed/runtime/config.py`
of 0.19.
"""

from typing import Any

from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.plan import Plan

NEVER = 2**31 - 1
"""Steps between lines that DeepSpeed prints: none ever comes."""

MOST_BUCKET_ELEMENTS = 200_000_000
"""Gradients that are reduced together; DeepSpeed holds one or two buffers of that many on the
device all the time.
"""


def engine_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, as it can be written as JSON.

    Args:
        config: The recipe, with `parallel.engine = "deepspeed"`.
        plan: What follows from it for these ranks.

    Raises:
        ConfigError: The JSON file that the recipe names cannot be read, or says otherwise than the
            recipe; all conflicts at once.
    """
    return derived(config, plan)


def derived(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return what follows from a recipe alone."""
    return {
        "train_batch_size": plan.rows_per_step,
        "train_micro_batch_size_per_gpu": plan.microbatch_rows,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": largest_norm(config) or 0.0,
        "bf16": {"enabled": plan.compute_dtype == "bfloat16"},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_settings(config, plan),
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def zero_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return the table `zero_optimization`."""
    settings: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "sub_group_size": config.offload.subgroup_elements,
        "contiguous_gradients": True,
        "reduce_bucket_size": min(MOST_BUCKET_ELEMENTS, plan.parameters),
    }
    if config.offload.strategy != "none":
        pinned = plan.device_type == "cuda"
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return settings
