"""Update rules of recipes, one small file each: how the `[optimizer]` table becomes a rule.

The rules themselves, formula and kernels, are in `interlace.kernels.update`. A plug-in registers a
function under the name that `optimizer.rule` then takes; a rule without kernels of its own is
served by its `plain` formula. Any rule can have its coordinates clipped (`[coordinate_clip]`).

Not here is SCALE (Glentis et al. 2025, arXiv 2506.16659), which divides the gradient by the norm of
each column and has momentum for the last layer only: a column spans the shards of a tensor, so its
norm is known only once all ranks have met, and rules here work element by element on any piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from interlace.trainer.config.clip_checks import clip_stage
from interlace.trainer.config.schema import OptimizerSection, RunConfig
from interlace.trainer.registry import Registry

if TYPE_CHECKING:
    from interlace.kernels.update import UpdateRule

    RuleBuilder = Callable[[OptimizerSection], UpdateRule]
    """Makes a rule of the `[optimizer]` table, in which the decay is set."""

RULES: Registry[RuleBuilder] = Registry(
    "update rule",
    "optimizer.rule",
    {
        "adamw": "interlace.trainer.rules.adamw",
        "sgd": "interlace.trainer.rules.sgd",
        "clipped_sgd": "interlace.trainer.rules.clipped_sgd",
        "signum": "interlace.trainer.rules.signum",
    },
)


USUAL_DECAY = 0.1

AT_LARGE_RATES = ("sgd", "clipped_sgd")
"""Rules whose learning rates would make the usual decay take off most of a matrix in a step."""


def update_rule(name: str) -> Callable[[RuleBuilder], RuleBuilder]:
    """Register a function as the maker of the rule that recipes call by this name."""
    return RULES.register(name)


def rule_of(config: RunConfig) -> UpdateRule:
    """Return the update rule of a recipe, its coordinates clipped where the recipe says so.

    Raises:
        ConfigError: There is none of this name.
    """
    from interlace.kernels.update import CoordinateClip

    settings = config.optimizer
    if settings.weight_decay is None:
        usual = 0.0 if settings.rule in AT_LARGE_RATES else USUAL_DECAY
        settings = settings.model_copy(update={"weight_decay": usual})
    rule = RULES.get(settings.rule)(settings)
    stage, clip = clip_stage(config), config.coordinate_clip
    if stage == "none":
        return rule
    return CoordinateClip(rule, clip.threshold, stage, clip.policy, clip.share)
