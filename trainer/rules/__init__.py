"""Update rules of recipes, one small file each: how the `[optimizer]` table becomes a rule.

The rules themselves, formula and kernels, are in `interlace.kernels.update`. A plug-in registers a
function under the name that `optimizer.rule` then takes; a rule without kernels of its own is
served by its `plain` formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.registry import Registry

if TYPE_CHECKING:
    from interlace.kernels.update import UpdateRule

    RuleBuilder = Callable[[OptimizerSection], UpdateRule]
    """Makes a rule of the `[optimizer]` table."""

RULES: Registry[RuleBuilder] = Registry(
    "update rule",
    "optimizer.rule",
    {
        "adamw": "interlace.trainer.rules.adamw",
        "sgd": "interlace.trainer.rules.sgd",
    },
)


def update_rule(name: str) -> Callable[[RuleBuilder], RuleBuilder]:
    """Register a function as the maker of the rule that recipes call by this name."""
    return RULES.register(name)


def rule_of(settings: OptimizerSection) -> UpdateRule:
    """Return the update rule of a recipe.

    Raises:
        ConfigError: There is none of this name.
    """
    return RULES.get(settings.rule)(settings)
