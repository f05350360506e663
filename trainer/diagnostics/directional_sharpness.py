"""Diagnostic `directional_sharpness`: how the loss bends along the steps of several update rules.

The directional sharpness of a step v is `<v, H v> / <v, v>`, H the Hessian of the training loss
(Pan and Li 2023, arXiv 2306.00204): what a step gains by its slope it loses by this, so that the
lower it is the longer a step may be. Their finding and ours: early in training it is far lower
along Adam's step than along that of gradient descent, and clipping the largest coordinates brings
it down as well. All rules are compared on the run's own trajectory, each by its shadow
(`directions`), on rows of the step's own batch and before its update. It is no full explanation:
tuned gradient descent can come close to Adam with small batches (arXiv 2506.12543).

It costs a forward and a backward pass over `sharpness.rows` with a graph of the backward pass, one
more backward pass per rule, and the shadows' moments. One rank only, and for models and objectives
that have a second derivative: not for Mamba-2, nor for the energy objective (whose loss holds a
derivative already) or distillation; `critical_sharpness` serves those.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from interlace.trainer.batches import StepBatches
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import diagnostic
from interlace.trainer.diagnostics.curvature import curvature_along, inner, measured_rows
from interlace.trainer.diagnostics.directions import refuse_early_updates, shadow_of
from interlace.trainer.engines.fsdp2 import own_optimizer
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Objective


@diagnostic("directional_sharpness")
class DirectionalSharpness:
    """Feeds the shadows in every step, and measures along their directions in some."""

    every_step = True

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        if state.world.size > 1:
            raise ConfigError(
                [
                    "observe.diagnostics=directional_sharpness: second derivatives are not taken "
                    f"through sharded layers, and this run has {state.world.size} ranks; type "
                    "observe.diagnostics=['critical_sharpness'], or start it on one"
                ]
            )
        optimizer = own_optimizer(state.engine)
        refuse_early_updates(optimizer, "directional_sharpness")
        assert isinstance(state.model, Model)
        self.model, self.optimizer, self.settings = state.model, optimizer, config.sharpness
        self.names = {id(each): name for name, each in self.model.named_parameters()}
        self.shadows = {name: shadow_of(name, self.model, config) for name in self.settings.rules}

    def provide(self, objective: Objective, batches: StepBatches) -> None:
        """Take what a loss is made of."""
        self.objective, self.batches = objective, batches

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return `directional_sharpness.RULE` for every rule in a step that is to be measured; a
        gradient that is not finite leaves the shadows as they are.
        """
        norm = self.optimizer.gradient_norm()
        if not math.isfinite(norm):
            return {}
        gradients = list(self.optimizer.gradients())
        masters = {each: self.optimizer.master(each).detach() for each, _ in gradients}
        due = self.settings.is_due(step)
        steps: dict[str, Sequence[torch.Tensor]] = {}
        for name, shadow in self.shadows.items():
            moved = shadow.follow(gradients, norm, masters)
            if due:
                steps[name] = unit_length(list(moved.values()), self.batches.world.device)
        return self.measured(step, masters, steps) if due else {}

    def measured(
        self,
        step: int,
        masters: Mapping[torch.Tensor, torch.Tensor],
        steps: Mapping[str, Sequence[torch.Tensor]],
    ) -> Mapping[str, float]:
        """Return the numbers of a step, at weights in full precision and along unit directions."""
        device = self.batches.world.device
        found = curvature_along(
            self.model,
            self.objective,
            list(measured_rows(self.batches, step - 1, self.settings.rows)),
            {self.names[id(each)]: weight.to(device) for each, weight in masters.items()},
            steps,
        )
        return {f"directional_sharpness.{name}": value for name, value in found.items()}


def unit_length(step: Sequence[torch.Tensor], device: torch.device) -> Sequence[torch.Tensor]:
    """Return a step of length one on a device; one of length zero as it is."""
    length = inner(step, step) ** 0.5
    return [(part / length if length else part).to(device) for part in step]
