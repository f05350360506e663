"""Depth plans, one small file each: how `model.pattern` becomes a stack of layers.

A plan is a function of the `[model]` table that returns one word per layer, each the letters of its
blocks. A layer is the unit of sharding, recomputation and compilation.
"""

from collections.abc import Callable

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.registry import Registry

DepthPlan = Callable[[ModelSection], tuple[str, ...]]

DEPTH_PLANS: Registry[DepthPlan] = Registry(
    "depth plan",
    "model.depth_plan",
    {
        "repeat": "interlace.trainer.models.depth.repeat",
        "spread": "interlace.trainer.models.depth.spread",
    },
)


def depth_plan(name: str) -> Callable[[DepthPlan], DepthPlan]:
    """Register a function as the depth plan that recipes call by this name."""
    return DEPTH_PLANS.register(name)


def layer_patterns(config: ModelSection) -> tuple[str, ...]:
    """Return the letters of every layer's blocks, from the first layer to the last.

    Raises:
        ConfigError: The depth plan is not registered.
        ValueError: The pattern cannot be read.
    """
    return DEPTH_PLANS.get(config.depth_plan)(config)
