"""What is needed of DeepSpeed: version, names, settings; all are looked at before anything changes.

All methods and attributes below are private to DeepSpeed and yet have been there since 0.12. One
that is missing, or a setting that means another update, is a reason not to attach: it is named, and
DeepSpeed runs as it is.
"""

import re
from collections.abc import Callable
from typing import Any

TESTED = ((0, 19), (0, 20))
"""The first version that is known to work, and the first that is not."""

STAGE_3, STAGES_1_AND_2 = "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer"
"""Classes of `engine.optimizer`; those derived from them are other engines."""

SHARED = ("optimizer", "step", "loss_scale", "clip_grad", "unscale_and_clip_grads")

NAMES = {
    STAGE_3: (
        *SHARED,
        "offload_optimizer",
        "swap_optimizer",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "fp16_groups",
        "norm_for_param_grads",
        "grad_position",
        "get_param_id",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
        "_unflatten_partitioned_parameters",
        "_post_step",
        "_overflow_clean_up",
    ),
    STAGES_1_AND_2: (
        *SHARED,
        "cpu_offload",
        "bit16_groups",
        "parallel_partitioned_bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "params_in_partition",
        "norm_for_param_grads",
        "grad_position",
        "get_param_id",
        "scaled_global_norm",
        "reset_cpu_buffers",
        "_update_scale",
        "_link_all_hp_params",
        "_lazy_init_hp_params_optimizer_state",
        "_hp_optimizer_states_linked",
    ),
}
"""What the update reads, calls or binds anew, by class."""


class Unserved(Exception):
    """Why DeepSpeed's own step stays, in words."""


Setting = tuple[str, Callable[[Any], bool], str]
"""Name of an attribute, what it may be, and words for why not where it is something else."""

SETTINGS: tuple[Setting, ...] = (
    ("offload_optimizer", bool, "state is not offloaded: set offload_optimizer.device to cpu"),
    ("cpu_offload", bool, "state is not offloaded: set offload_optimizer.device to cpu"),
    ("swap_optimizer", lambda value: not value, "state is offloaded to NVMe"),
    ("params_in_nvme_and_cpu", lambda value: not value, "parameters are offloaded to NVMe"),
    ("partial_offload", lambda value: value == 1.0, "offload_optimizer.ratio is not 1"),
    ("zenflow", lambda value: not value, "ZenFlow makes another update"),
    ("use_muon", lambda value: not value, "Muon makes another update"),
    ("torch_autocast_gradscaler", lambda value: value is None, "torch's GradScaler steps"),
)
"""What is looked at where a version has it."""


def check_version(version: str) -> None:
    """Raise `Unserved` for a version of DeepSpeed that nobody has tried."""
    first, beyond = TESTED
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not first <= numbers < beyond:
        known, unknown = (".".join(str(number) for number in pair) for pair in TESTED)
        raise Unserved(f"this is DeepSpeed {version}, and {known} up to but not {unknown} is known")


def check_names(zero: Any) -> None:
    """Raise `Unserved` unless an optimizer of an engine is of a known class with all its names."""
    kind = type(zero).__name__
    if kind not in NAMES:
        known = " and ".join(NAMES)
        raise Unserved(
            f"engine.optimizer is of class {kind}, and known are {known}, those of "
            "zero_optimization.stage 1, 2 and 3 with offload_optimizer.device cpu"
        )
    missing = [name for name in NAMES[kind] if not hasattr(zero, name)]
    if missing:
        raise Unserved(f"{kind} of this DeepSpeed has no {', '.join(missing)}")


def check_settings(zero: Any) -> None:
    """Raise `Unserved` for a setting under which DeepSpeed makes another update. It may lack names
    then, so that settings are looked at first.
    """
    for name, fits, words in SETTINGS:
        if hasattr(zero, name) and not fits(getattr(zero, name)):
            raise Unserved(f"{words} ({name}={getattr(zero, name)!r})")
