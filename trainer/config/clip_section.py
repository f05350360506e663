"""The `[coordinate_clip]` table: every coordinate of a direction is cut at a threshold.

Pan and Li 2023 (arXiv 2306.00204): a few coordinates make the loss sharp along the gradient;
without them plain gradient descent takes steps as large as Adam's.
"""

from typing import Annotated, Literal

from pydantic import Field

from interlace.trainer.config.section import PositiveFloat, Section


class CoordinateClipSection(Section):
    """How coordinates are clipped (arXiv 2306.00204); on by itself with `clipped_sgd`."""

    stage: Literal["auto", "none", "gradient", "update"] = "auto"
    """What is clipped: the gradient before momentum (before Adam's first moment, while the second
    sees all of it), the final update, or nothing. auto: the gradient with
    `optimizer.rule = "clipped_sgd"`, else nothing.
    """

    policy: Literal["fixed", "lagged_quantile", "global_quantile"] = "fixed"
    """Where thresholds come from: `fixed`, the same on all shards and devices, and known during
    backward; `lagged_quantile`, of each tensor's gradient one step before, likewise;
    `global_quantile`, of all gradients of the step as published, known after backward only.
    """

    threshold: PositiveFloat = 1e-3
    """With `fixed`: largest magnitude of a coordinate, at `mup.base_width`; muP rescales it per
    tensor as the gradient shrinks. The loss is a mean over tokens, so 1e-3 clips a fifth to a
    third of a small model's coordinates.
    """

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """With a quantile: share of coordinates that are clipped. Published are 0.1 for gradient
    descent and 0.5 for Adam's first moment.
    """
