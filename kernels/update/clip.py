"""Coordinate clipping: no coordinate of a direction is larger than a threshold.

Pan and Li 2023 (arXiv 2306.00204) find that a few coordinates make the loss sharp along the
direction in which gradient descent goes, far sharper than along Adam's. With those cut, plain
gradient descent takes steps as large as Adam's, with half of its state, or none without momentum.
A clip wraps a rule. It is elementwise and needs no norm of all gradients, so that an update may run
while others are still being computed.

Where thresholds come from is a policy, and not the kernels' business: they read
`hyper["threshold"]`. A threshold of 0 lets nothing move but what momentum and decay do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from interlace.kernels.update.limit import Count, Limit, Stage
from interlace.kernels.update.rules import SGD, AdamW, Signum, UpdateRule

COMPILED: tuple[type, ...] = (AdamW, SGD, Signum)
"""Rules with kernels, whose formulas know of clipping; a class derived from one is neither."""

Policy = Literal["fixed", "lagged_quantile", "global_quantile"]
"""Where thresholds come from; see `CoordinateClip`."""

Limits = tuple[float | None, float | None]
"""Limits of gradient and direction in a kernel, or None."""


@dataclass(frozen=True)
class CoordinateClip:
    """Any rule, with coordinates clipped; and with those of the gradient that are not finite taken
    as 0, before everything else, whatever the threshold.

    Attributes:
        rule: Rule whose gradient or update is clipped.
        threshold: Largest magnitude of a coordinate; infinity clips nothing, but guards.
        stage: "gradient" clips what enters momentum; of Adam only its first moment, while the
            second sees all of it. "update" clips the direction that the learning rate scales, after
            momentum. Decoupled decay is clipped by neither; SGD's coupled decay is added to a
            clipped gradient, and is part of the direction.
        policy: "fixed" keeps the threshold: it is the same on every shard, subgroup and device, and
            known during backward. "lagged_quantile" takes the quantile of each tensor's non-zero
            gradient one step before: no threshold to tune, known during backward, one number a
            tensor to save. "global_quantile" takes one quantile over all coordinates of the same
            step, as published: it can be known only after backward.
        share: Share of coordinates that a quantile leaves above it. Published are 0.1 for gradient
            descent and 0.5 for Adam's first moment.
    """

    rule: UpdateRule
    threshold: float = 1e-3
    stage: Stage = "gradient"
    policy: Policy = "fixed"
    share: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if isinstance(self.rule, CoordinateClip):
            raise ValueError("rule is a CoordinateClip already: clip one stage, once")
        if not self.threshold > 0.0:
            raise ValueError(
                f"threshold={self.threshold}: must be more than 0; infinity clips nothing"
            )
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share={self.share}: must be between 0 and 1")
        for name, value, known in (
            ("stage", self.stage, get_args(Stage)),
            ("policy", self.policy, get_args(Policy)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: must be {' or '.join(map(repr, known))}")

    @property
    def name(self) -> str:
        """The rule's own name, which selects the kernel."""
        return self.rule.name

    @property
    def moments(self) -> tuple[str, ...]:
        """The rule's own state: clipping adds none."""
        return self.rule.moments

    @property
    def scale_free(self) -> bool:
        """As of the rule alone: muP scales thresholds as gradients, rates as without a clip."""
        return self.rule.scale_free

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups: the rule's, and `threshold`."""
        return {**self.rule.hyperparameters(), "threshold": self.threshold}

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return those of the rule alone."""
        return self.rule.scalars(number, hyper)

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        """Update in place, as the rule does but for the clip."""
        self.plain_counted(weight, gradient, moments, number, hyper)

    def plain_counted(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> Count:
        """As `plain`, and return how many coordinates were cut or were not finite."""
        rule = self.rule
        limit = Limit(self.stage, threshold_in(hyper))
        guarded = limit.guard(gradient)
        if type(rule) in COMPILED:
            cast(AdamW | SGD | Signum, rule).formula(weight, guarded, moments, number, hyper, limit)
        elif self.stage == "gradient":
            rule.plain(weight, limit.cut(guarded), moments, number, hyper)
        else:
            bare, lr = {**hyper, "weight_decay": 0.0}, float(hyper["lr"])
            moved = weight.clone()
            rule.plain(moved, guarded, moments, number, bare)
            if lr:
                direction = limit.cut((weight - moved) / lr)
                weight.mul_(1.0 - lr * hyper.get("weight_decay", 0.0)).sub_(lr * direction)
        return limit.count


def threshold_in(hyper: Mapping[str, Any]) -> float:
    """Return the threshold of one step.

    Raises:
        ValueError: It is below 0, or not a number.
    """
    threshold = float(hyper["threshold"])
    if not threshold >= 0.0:
        raise ValueError(f"threshold={threshold} in a parameter group: must be 0 or more")
    return threshold


def limits_of(rule: UpdateRule, number: int, hyper: Mapping[str, Any]) -> Limits:
    """Return what the kernels of a rule limit in update `number`: the gradient, and the direction
    as they compute it; None for what they leave alone.
    """
    if not isinstance(rule, CoordinateClip):
        return None, None
    threshold = threshold_in(hyper)
    if rule.stage == "gradient":
        return threshold, None
    if isinstance(rule.rule, AdamW):
        # The kernel leaves the correction of the first moment to the step size.
        threshold *= 1.0 - hyper["betas"][0] ** number
    return None, threshold


def clipped_sgd(
    lr: float = 1e-3,
    threshold: float = 1e-3,
    momentum: float = 0.9,
    *,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    stage: Stage = "gradient",
    policy: Policy = "fixed",
    share: float = 0.1,
) -> CoordinateClip:
    """Return coordinate-clipped SGD with decoupled weight decay; its parts say what values mean.

    Raises:
        ValueError: A value is outside its range.
    """
    rule = SGD(lr, momentum, weight_decay, nesterov, decoupled=True)
    return CoordinateClip(rule, threshold, stage, policy, share)
