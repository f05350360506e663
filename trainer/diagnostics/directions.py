"""The steps that update rules would take, all along one and the same run.

Each rule has a shadow: moments of its own, fed with the run's gradients in every step, in fp32
where the gradient is. A rule's direction is what its formula makes of a copy of the weights, with
the learning rates and thresholds that a run of its own would have, and without weight decay.
Nothing of it touches the run. Shadows are not saved: after a resume their moments begin at zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from interlace.kernels.update import UpdateRule
from interlace.offload.optimizer import OffloadedOptimizer
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
        groups: Its parameter groups, as an optimizer takes them.
        clip_norm: Largest global norm of what it is given, or None.
    """

    def __init__(
        self,
        rule: UpdateRule,
        groups: Iterable[Mapping[str, Any]],
        clip_norm: float | None,
    ) -> None:
        self.rule, self.clip_norm = rule, clip_norm
        self.hyper: dict[torch.Tensor, dict[str, Any]] = {}
        for group in groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                self.hyper[parameter] = rule.hyperparameters() | settings | {"weight_decay": 0.0}
        self.moments: dict[torch.Tensor, tuple[torch.Tensor, ...]] = {}
        self.updates: dict[torch.Tensor, int] = {}

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
        return {
            parameter: self.step_of(parameter, gradient.to(EXACT) * scale, weights[parameter])
            for parameter, gradient in gradients
        }

    def step_of(
        self, parameter: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Advance the moments of one parameter; return its step."""
        if parameter not in self.moments:
            zeros = torch.atleast_1d(torch.zeros_like(gradient, dtype=torch.float32))
            self.moments[parameter] = tuple(zeros.clone() for _ in self.rule.moments)
        kept = [moment.to(gradient.device, EXACT) for moment in self.moments[parameter]]
        number = self.updates[parameter] = self.updates.get(parameter, 0) + 1
        start = torch.atleast_1d(weight.to(gradient.device, EXACT))
        gradient, moved = torch.atleast_1d(gradient), start.clone()
        for rows, hyper in blocks_of(self.hyper[parameter], len(moved)):
            parts = [each[rows] for each in (moved, gradient, *kept)]
            self.rule.plain(parts[0], parts[1], tuple(parts[2:]), number, hyper)
        self.moments[parameter] = tuple(moment.float() for moment in kept)
        return (moved - start).float().view(weight.shape)


def blocks_of(hyper: Mapping[str, Any], rows: int) -> list[tuple[slice, dict[str, Any]]]:
    """Return the blocks of rows of a parameter and the hyperparameters of each: those of the group
    times the block's factors.
    """
    own = {name: value for name, value in hyper.items() if name != "row_blocks"}
    blocks: list[tuple[slice, dict[str, Any]]] = []
    start = 0
    for block in hyper.get("row_blocks") or ({"rows": rows},):
        factors = {name: factor for name, factor in block.items() if name in own}
        scaled = {name: own[name] * factor for name, factor in factors.items()}
        blocks.append((slice(start, start + block["rows"]), own | scaled))
        start += block["rows"]
    return blocks


def shadow_of(name: str, model: Model, config: RunConfig) -> Shadow:
    """Return the shadow of a rule by its name in recipes, with a recipe's other settings."""
    own = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"rule": name})}
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
