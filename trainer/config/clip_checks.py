"""What the clipping settings of a recipe mean together, and checks of them.

Gradients are clipped by the norm of all of them, or coordinate by coordinate (Pan and Li 2023,
arXiv 2306.00204). The second needs no norm, so that an update need not wait for the end of
backward; the first is therefore off by itself where the second is on. Checks return None or one
message with key, value, reason and remedy, as those in `checks`.
"""

from typing import Literal

from interlace.trainer.config.schema import RunConfig

USUAL_NORM = 1.0
"""Largest gradient norm where a recipe does not say it."""

MOMENTUM_RULES = ("sgd", "clipped_sgd")
"""Built-in rules that can look ahead along their momentum."""

OTHER_RULES = ("adamw", "signum")
"""Built-in rules that cannot."""


def clip_stage(config: RunConfig) -> Literal["none", "gradient", "update"]:
    """Return what is clipped coordinate by coordinate: as asked, else the gradient with
    `clipped_sgd` and nothing with other rules.
    """
    stage = config.coordinate_clip.stage
    if stage != "auto":
        return stage
    return "gradient" if config.optimizer.rule == "clipped_sgd" else "none"


def clips_coordinates(config: RunConfig) -> bool:
    """Whether coordinates are clipped."""
    return clip_stage(config) != "none"


def largest_norm(config: RunConfig) -> float | None:
    """Return the norm at which gradients are clipped, or None where they are not."""
    asked = config.optimizer.clip
    if asked is None:
        return None if clips_coordinates(config) else USUAL_NORM
    return asked or None


def waits_for_all_gradients(config: RunConfig) -> bool:
    """Whether an update needs to know all gradients, which it does after backward only: for their
    norm, a quantile, or because it may be skipped as a spike.
    """
    whole = clips_coordinates(config) and config.coordinate_clip.policy == "global_quantile"
    return whole or largest_norm(config) is not None or config.guard.spike_sigmas > 0


def overlap_is_exact(config: RunConfig) -> str | None:
    """An update clipped by the norm waits for the norm of all gradients."""
    limit = largest_norm(config)
    if config.offload.overlap != "backward" or limit is None:
        return None
    return (
        f"offload.overlap=backward: optimizer.clip={limit} needs the norm of all "
        "gradients, which is known after backward only; type offload.overlap=forward or "
        "optimizer.clip=0"
    )


def quantile_is_known_in_time(config: RunConfig) -> str | None:
    """A quantile of all gradients waits for all gradients."""
    policy = config.coordinate_clip.policy
    if not clips_coordinates(config) or policy != "global_quantile":
        return None
    if config.offload.overlap != "backward":
        return None
    return (
        "coordinate_clip.policy=global_quantile: the quantile of all gradients is known after "
        "backward only, and offload.overlap=backward starts updates before; type "
        "offload.overlap=forward, or coordinate_clip.policy=lagged_quantile"
    )


def quantile_is_of_what_is_clipped(config: RunConfig) -> str | None:
    """Quantiles are measured on gradients."""
    policy = config.coordinate_clip.policy
    if clip_stage(config) != "update" or policy == "fixed":
        return None
    return (
        f"coordinate_clip.policy={policy}: quantiles are those of the gradient, and "
        "coordinate_clip.stage=update clips what the rule makes of it, which has another scale; "
        "type coordinate_clip.policy=fixed or coordinate_clip.stage=gradient"
    )


def clipped_sgd_clips(config: RunConfig) -> str | None:
    """A rule that is called clipped clips."""
    if config.optimizer.rule != "clipped_sgd" or clips_coordinates(config):
        return None
    return (
        "coordinate_clip.stage=none: optimizer.rule=clipped_sgd would clip nothing; type "
        "optimizer.rule=sgd for gradient descent as it is, or coordinate_clip.stage=gradient"
    )


def nesterov_has_momentum(config: RunConfig) -> str | None:
    """What looks ahead along the momentum has one."""
    settings = config.optimizer
    if not settings.nesterov:
        return None
    if settings.rule in OTHER_RULES:
        return (
            f"optimizer.nesterov=true: optimizer.rule={settings.rule} does not look ahead; type "
            f"optimizer.nesterov=false, or one of optimizer.rule={', '.join(MOMENTUM_RULES)}"
        )
    if settings.rule in MOMENTUM_RULES and not settings.beta1:
        return (
            f"optimizer.beta1={settings.beta1}: is the momentum of optimizer.rule={settings.rule}, "
            "and optimizer.nesterov=true looks ahead along it; type optimizer.beta1=0.9 or "
            "optimizer.nesterov=false"
        )
    return None
