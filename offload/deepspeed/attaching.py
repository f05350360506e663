"""`attach` and `detach`: what can be attached is, and for all else DeepSpeed stays as it is, with a
warning that says why.
"""

import importlib
import logging
import warnings
from typing import Any

import torch

from interlace.offload.deepspeed.attachment import Attachment
from interlace.offload.deepspeed.names import (
    STAGE_3,
    Unserved,
    check_names,
    check_settings,
    check_version,
)
from interlace.offload.deepspeed.rules import rule_of
from interlace.offload.deepspeed.stages import Stage3, Stages1And2
from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import MemoryBudget, MemoryShortage, Strategy

logger = logging.getLogger(__name__)

MARK = "interlace_attachment"
"""Attribute of an engine's optimizer."""

OTHERS = ("moment_dtype", "split_master", "accumulation_steps", "stream_gradients")
"""Options that DeepSpeed decides."""


def attach(
    engine: Any,
    *,
    strategy: Strategy | None = None,
    budget: MemoryBudget | None = None,
    profile: HardwareProfile | None = None,
    options: OffloadOptions | None = None,
) -> Attachment | None:
    """Put the interleaved update in the place of ZeRO's; between steps, at any time.

    Args:
        engine: What `deepspeed.initialize` returned, of ZeRO stage 1, 2 or 3 with
            `offload_optimizer.device: cpu`.
        strategy: See `OffloadedOptimizer`; None means `optimal`, and `host` on a CPU without a
            profile.
        budget: Memory that state may occupy; None means what is free, with a margin.
        profile: What the machine can do; None means the profile on record, measured if need be.
        options: `subgroup_elements` cuts long partitions; see `OffloadOptions`.

    Returns:
        The attachment; None, after a warning, where DeepSpeed's own update stays.

    Raises:
        TypeError: It is no engine, but a model, say.
        ValueError: The engine is attached already, or an option is DeepSpeed's to decide.
    """
    options = options or OffloadOptions()
    check_options(options)
    zero = optimizer_of(engine)
    if getattr(zero, MARK, None) is not None:
        raise ValueError("this engine is attached already; detach(engine) first")
    attachment: Attachment | None = None
    try:
        attachment = attached(zero, strategy, budget, profile, options)
    except (Unserved, MemoryShortage) as reason:
        warnings.warn(f"not attached, DeepSpeed updates as it does without: {reason}", stacklevel=2)
        return None
    setattr(zero, MARK, attachment)
    logger.info("attached: %d subgroups, homes %s", len(attachment.homes), attachment.homes)
    return attachment


def optimizer_of(engine: Any) -> Any:
    """Return the optimizer of an engine, or raise `TypeError` for what is none."""
    if not hasattr(engine, "optimizer"):
        raise TypeError(
            f"a {type(engine).__name__} is no engine of DeepSpeed; give what deepspeed.initialize "
            "returned first:  engine, *_ = deepspeed.initialize(...)"
        )
    return engine.optimizer


def attached(
    zero: Any,
    strategy: Strategy | None,
    budget: MemoryBudget | None,
    profile: HardwareProfile | None,
    options: OffloadOptions,
) -> Attachment:
    """Attach to the optimizer of an engine, after every look that needs no change.

    Raises:
        Unserved: It cannot be.
        MemoryShortage: State does not fit.
    """
    check_version(str(loaded().__version__))
    check_settings(zero)
    check_names(zero)
    rule = rule_of(zero.optimizer)
    stage = Stage3(zero) if type(zero).__name__ == STAGE_3 else Stages1And2(zero)
    check_tensors(stage)
    on_cpu = stage.lent()[0].weight.device.type == "cpu"
    simple: Strategy = "host" if on_cpu and profile is None else "optimal"
    made = Attachment(stage, rule, strategy or simple, budget, profile, options)
    stage.bind(made)
    return made


def loaded() -> Any:
    """Return the package deepspeed, or raise `ImportError` that says what to install."""
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        words = f"attaching needs DeepSpeed ({error}): pip install 'interlace[deepspeed]'"
        raise ImportError(words) from error


def check_tensors(stage: Stage3 | Stages1And2) -> None:
    """Raise `Unserved` unless masters are kept in float32 and weights are on the device."""
    device = torch.device(loaded().get_accelerator().current_device_name()).type
    for lent in stage.lent():
        if lent.tensor.dtype is not torch.float32:
            raise Unserved(f"masters are kept in {lent.tensor.dtype}, not in float32")
        if lent.weight.device.type != device:
            raise Unserved(f"weights are on {lent.weight.device.type}: offload_param is on")


def check_options(options: OffloadOptions) -> None:
    """Refuse options that say what DeepSpeed's configuration says."""
    usual = OffloadOptions()
    set_here = [name for name in OTHERS if getattr(options, name) != getattr(usual, name)]
    if set_here:
        raise ValueError(
            f"{', '.join(set_here)}: DeepSpeed's configuration decides these; leave them out"
        )


def detach(engine: Any) -> None:
    """Give an engine ZeRO's own update back, between steps; state stays where DeepSpeed looks for
    it, on the host. An engine that is not attached is left alone.
    """
    zero = optimizer_of(engine)
    attachment = getattr(zero, MARK, None)
    if attachment is not None:
        attachment.close()
        delattr(zero, MARK)
