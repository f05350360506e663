"""The JSON of DeepSpeed that a recipe means.

Batch, accumulation, clipping, precision, stage and where optimizer state lies follow from the
recipe and its plan, and nobody types them twice. Gradients are reduced and summed in float32
whatever the compute dtype, as with FSDP2: DeepSpeed by itself does both in bfloat16 where weights
have it. What DeepSpeed would print or time is off, since the loop does so. DeepSpeed itself is not
loaded here. Reference: https://www.deepspeed.ai/docs/config-json/ and `deepspeed/runtime/config.py`
of 0.19.
"""

from typing import Any

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.division import bucket_elements
from interlace.trainer.engines.zero.decisions import OFFLOAD, decisions_of
from interlace.trainer.engines.zero.merging import Merge
from interlace.trainer.engines.zero.own_settings import read_own_settings
from interlace.trainer.engines.zero.refusals import REFUSALS
from interlace.trainer.errors import ConfigError
from interlace.trainer.plan import Plan

NEVER = 2**31 - 1
"""Steps between lines that DeepSpeed prints: none ever comes."""


def engine_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, as it can be written as JSON.

    Args:
        config: The recipe, with `parallel.engine = "deepspeed"`.
        plan: What follows from it for these ranks.

    Raises:
        ConfigError: The JSON file that the recipe names cannot be read, or says otherwise than the
            recipe; all conflicts at once. Or DeepSpeed would take another optimizer than ZeRO's.
    """
    file = config.parallel.deepspeed_config
    decisions = decisions_of(config, plan)
    merge = Merge(defaults(config, plan), decisions, REFUSALS)
    for path, decision in decisions.items():
        if path != f"{OFFLOAD}.device" or decision.value != "none":
            merge.put(path.split("."), decision.value)
    merge.add(renamed(read_own_settings(file)))
    problems = [f"parallel.deepspeed_config={file}: {problem}" for problem in merge.problems]
    if found := sums_elsewhere(config, plan, merge.settings):
        problems.append(found)
    if problems:
        raise ConfigError(problems)
    return merge.settings


def defaults(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return what is better than DeepSpeed's own defaults, and what the user's file may change."""
    zero: dict[str, Any] = {
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_elements(plan.parameters),
    }
    if config.offload.strategy != "none":
        zero["offload_optimizer"] = {"pin_memory": plan.device_type == "cuda"}
    return {
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if sums_nothing(config, plan) else "fp32"},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        # ZeRO asks for it where it does not know the class of an optimizer.
        "zero_allow_untested_optimizer": True,
        # DeepSpeedCPUAdam would take the place of torch's optimizer.
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
    }


def renamed(own: dict[str, Any]) -> dict[str, Any]:
    """Return a user's settings under the names that DeepSpeed looks at first."""
    own = dict(own)
    if "bfloat16" in own and "bf16" not in own:
        own["bf16"] = own.pop("bfloat16")
    zero = own.get("zero_optimization")
    if isinstance(zero, dict) and "offload_optimizer" in zero and zero["offload_optimizer"] is None:
        own["zero_optimization"] = {**zero, "offload_optimizer": {"device": "none"}}
    return own


def in_another_optimizer(config: RunConfig, plan: Plan) -> bool:
    """Whether DeepSpeed would leave ZeRO's own optimizer for one of bfloat16, if gradients were
    summed in float32.
    """
    offloads = config.offload.strategy != "none"
    return config.parallel.zero_stage == 1 and plan.compute_dtype == "bfloat16" and not offloads


def sums_nothing(config: RunConfig, plan: Plan) -> bool:
    """Whether gradients may stay in bfloat16 where ZeRO's own optimizer wants that: they come once
    in a step, and ranks sum them in float32.
    """
    return in_another_optimizer(config, plan) and plan.accumulation == 1


def sums_elsewhere(config: RunConfig, plan: Plan, settings: dict[str, Any]) -> str | None:
    """Return what speaks against a run for which DeepSpeed leaves ZeRO's own optimizer."""
    in_float32 = settings["data_types"]["grad_accum_dtype"] == "fp32"
    if not (in_another_optimizer(config, plan) and in_float32):
        return None
    return (
        f"parallel.zero_stage=1: the {plan.accumulation} passes of a step are summed in float32, "
        "which DeepSpeed does in another optimizer than that of ZeRO where weights are in bfloat16 "
        "and no state is offloaded, and whose state is not known here; type "
        "parallel.zero_stage=2, offload.strategy=host or train.compute_dtype=float32"
    )
