"""The steps that update rules would take, all along one and the same run.

Each rule has a shadow: moments of its own, fed with the run's gradients in every step, in fp32
where the gradient is. A rule's direction is what its formula makes of a copy of the weights, with
the learning rates and thresholds that a run of its own would have, and without weight decay.
Nothing of it touches the run. Shadows are not saved: after a resume their moments begin at zero,
and so do thresholds that follow the gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from interlace.kernels.update import CoordinateClip, UpdateRule
from interlace.kernels.update.histogram import magnitude_histogram, quantile_of
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.row_blocks import blocks_of, local_blocks
from interlace.offload.segments import scaled
from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.optimizer import parameter_groups
from interlace.trainer.rules import rule_of

Gradients = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Parameters and the gradients that came for them."""

EXACT = torch.float64
"""Directions are differences of weights: they are taken in more digits than weights have."""


class Shadow:
    """One rule's moments along the gradients of a run; 4 bytes per parameter for each moment.

    Args:
        rule: The rule with its hyperparameters.
        groups: Its parameter groups, as an `OffloadedOptimizer` takes them.
        clip_norm: Largest global norm of what it is given, or None.
    """

    def __init__(
        self, rule: UpdateRule, groups: Sequence[Mapping[str, Any]], clip_norm: float | None
    ) -> None:
        self.rule, self.clip_norm = rule, clip_norm
        self.groups = {each: group for group in groups for each in group["params"]}
        self.moments: dict[torch.Tensor, tuple[torch.Tensor, ...]] = {}
        self.updates: dict[torch.Tensor, int] = {}
        self.thresholds: dict[tuple[torch.Tensor, int], float] = {}

    @torch.no_grad()
    def follow(
        self, gradients: Gradients, norm: float, weights: Mapping[torch.Tensor, torch.Tensor]
    ) -> dict[torch.Tensor, torch.Tensor]:
        """Take one step's gradients in; return the step that the rule would take, fp32.

        Args:
            gradients: Whole, all finite.
            norm: Their global norm.
            weights: In full precision, by parameter.
        """
        scale = 1.0
        if self.clip_norm is not None and norm > self.clip_norm:
            scale = self.clip_norm / (norm + 1e-6)
        flat = [(each, gradient.reshape(-1).float() * scale) for each, gradient in gradients]
        for_all = self.threshold_of(flat)
        return {
            parameter: self.step_of(parameter, gradient, weights[parameter], for_all)
            for parameter, gradient in flat
        }

    def step_of(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        threshold: float | None,
    ) -> torch.Tensor:
        """Advance the moments of one parameter by a flat gradient; return its step."""
        if parameter not in self.moments:
            self.moments[parameter] = tuple(torch.zeros_like(gradient) for _ in self.rule.moments)
        kept = [moment.to(gradient.device, EXACT) for moment in self.moments[parameter]]
        number = self.updates[parameter] = self.updates.get(parameter, 0) + 1
        before = weight.reshape(-1).to(gradient.device, EXACT)
        after, exact = before.clone(), gradient.to(EXACT)
        for place, start, stop, hyper in self.blocks(parameter):
            lagged = self.lagged_threshold((parameter, place), gradient[start:stop])
            moving = lagged if threshold is None else threshold
            if moving is not None:
                hyper["threshold"] = moving
            parts = [each[start:stop] for each in (after, exact, *kept)]
            self.rule.plain(parts[0], parts[1], tuple(parts[2:]), number, hyper)
        self.moments[parameter] = tuple(moment.float() for moment in kept)
        return (after - before).float().view(weight.shape)

    def blocks(self, parameter: torch.Tensor) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        """Yield number, first and last element, and hyperparameters of every row block of a
        parameter.
        """
        group = self.groups[parameter]
        own = {name: value for name, value in group.items() if name != "params"}
        shared: dict[str, object] = {**self.rule.hyperparameters(), **own, "weight_decay": 0.0}
        blocks = blocks_of(group)
        for place, start, stop in local_blocks(group, parameter):
            yield place, start, stop, dict(scaled(shared, blocks[place]) if blocks else shared)

    def threshold_of(self, gradients: Gradients) -> float | None:
        """Return the threshold of one step where all tensors have the same, else None."""
        rule = self.rule
        if not isinstance(rule, CoordinateClip) or rule.policy != "global_quantile":
            return None
        counts = [magnitude_histogram(gradient).cpu() for _, gradient in gradients]
        total = sum(gradient.numel() for _, gradient in gradients)
        return quantile_of(torch.stack(counts).sum(0), rule.share, total)

    def lagged_threshold(
        self, block: tuple[torch.Tensor, int], gradient: torch.Tensor
    ) -> float | None:
        """Return the threshold of a block that is lagged, and make that of the next step; None
        where it is not lagged. It is 0 as long as no gradient but zero came.
        """
        rule = self.rule
        if not isinstance(rule, CoordinateClip) or rule.policy != "lagged_quantile":
            return None
        before = self.thresholds.get(block, 0.0)
        counts = magnitude_histogram(gradient)
        if bool(counts.any()):
            self.thresholds[block] = quantile_of(counts, rule.share)
        return before


def shadow_of(name: str, model: Model, config: RunConfig) -> Shadow:
    """Return the shadow of a rule by its name in recipes, with a recipe's other settings; of the
    built-in rules `clipped_sgd` is clipped, whatever the recipe clips.
    """
    own = config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"rule": name}),
            "coordinate_clip": config.coordinate_clip.model_copy(update={"stage": "auto"}),
        }
    )
    rule = rule_of(own)
    manifest = manifest_of(own, model.embedding.num_embeddings)
    groups = parameter_groups(model, rule.hyperparameters(), manifest)
    return Shadow(rule, groups, largest_norm(own))


def refuse_early_updates(optimizer: OffloadedOptimizer, name: str) -> None:
    """Raise `ConfigError` if weights change before a diagnostic could look at them."""
    if optimizer.overlap == "backward":
        raise ConfigError(
            [
                f"observe.diagnostics={name}: with offload.overlap=backward weights change before "
                "the gradient is complete, and their curvature belongs to none; type "
                "offload.overlap=forward"
            ]
        )
