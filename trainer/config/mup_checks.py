"""Checks of the `[mup]` table.

Each returns None or one message with key, value, reason and remedy, as those in `checks`.
"""

from interlace.trainer.config.clip_checks import clip_stage
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError


def mup_has_its_base(config: RunConfig) -> str | None:
    """Everything follows the width from somewhere, and the recipe has an equal there."""
    mup = config.mup
    if not mup.enabled:
        return None
    if mup.base_width is None:
        return (
            "mup.enabled=true: needs the width whose settings are carried over, at which nothing "
            f"changes; type mup.base_width={config.model.width} to begin with this one"
        )
    from interlace.trainer.mup.widths import at_width, with_whole_heads

    try:
        at_width(with_whole_heads(config, [mup.base_width])[0], mup.base_width)
    except ConfigError as error:
        return f"mup.base_width={mup.base_width}: {error.problems[0]}"
    return None


def threshold_follows_the_width(config: RunConfig) -> str | None:
    """A threshold that stays the same while gradients shrink stops clipping."""
    stage, fixed = clip_stage(config), config.coordinate_clip.policy == "fixed"
    # An update like Adam's has one scale at all widths; that of gradient descent is the gradient's.
    descends = config.optimizer.rule in {"sgd", "clipped_sgd"}
    shrinks = stage == "gradient" or (stage == "update" and descends)
    if not (config.mup.enabled and shrinks and fixed and "threshold" in config.mup.without):
        return None
    return (
        "mup.without=threshold: under muP the coordinates of a gradient shrink as the width grows, "
        "so a fixed threshold that does not clips less and less, until nothing is clipped, at a "
        "rate meant for clipped coordinates; leave it out, or type "
        "coordinate_clip.policy=lagged_quantile, which follows by itself"
    )


def rules_are_left_out_of_something(config: RunConfig) -> str | None:
    """Leaving out rules means something only where there are any."""
    if config.mup.enabled or not config.mup.without:
        return None
    return (
        f"mup.without={config.mup.without}: mup.enabled=false leaves out all rules; type "
        "mup.enabled=true or mup.without=[]"
    )
