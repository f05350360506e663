"""Diagnostic `critical_sharpness`: 2 / the smallest learning rate whose step raises the loss.

Forward passes are all it takes, about seven, so it serves models whose Hessian nobody can afford,
on any number of ranks. For gradient descent on a quadratic loss it is the directional sharpness of
the gradient, and training is at the edge of stability (Cohen et al. 2021, arXiv 2103.00065) when it
reaches 2 / learning rate. The direction is the update as the run made it: momentum, preconditioner,
clipping and decay included. Between backward and update it keeps a copy of the weights in full
precision, 4 bytes per parameter of this rank's shards, while measuring twice as much and the
weights themselves.
"""

import math
from collections.abc import Callable, Mapping

import torch

from interlace.offload.subgroup import local
from interlace.trainer.batches import Batch, StepBatches
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import diagnostic
from interlace.trainer.diagnostics.curvature import measured_rows, measuring
from interlace.trainer.diagnostics.directions import refuse_early_updates
from interlace.trainer.engines.fsdp2 import own_optimizer
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Objective
from interlace.trainer.schedules import learning_rate

REFINEMENTS = 2
"""Passes between the bracket's ends; where the loss is a parabola the first meets it exactly."""

GROWTH = 4.0
"""How much longer the next step is that is tried."""

LARGEST_MULTIPLE, SMALLEST_MULTIPLE = 2.0**20, 2.0**-10
"""Of the step that the run made: where the search for the bracket ends."""


@diagnostic("critical_sharpness")
class CriticalSharpness:
    """Keeps the weights before a chosen update, and looks along it afterwards."""

    every_step = True

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        optimizer = own_optimizer(state.engine)
        refuse_early_updates(optimizer, "critical_sharpness")
        assert isinstance(state.model, Model)
        self.model, self.optimizer, self.world = state.model, optimizer, state.world
        self.settings, self.schedule = config.sharpness, config.optimizer
        self.before: dict[torch.Tensor, torch.Tensor] = {}

    def provide(self, objective: Objective, batches: StepBatches) -> None:
        """Take what a loss is made of."""
        self.objective, self.batches = objective, batches

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Remember the weights if the step's update is to be measured."""
        if self.settings.is_due(step):
            self.before = self.masters()
        return {}

    def after_update(self, step: int) -> Mapping[str, float]:
        """Return `critical_sharpness`, and `critical_learning_rate` that it belongs to; nothing of
        a step that was skipped, or whose loss was not finite.
        """
        if not self.before:
            return {}
        before, self.before = self.before, {}
        rate = learning_rate(step - 1, self.batches.plan.steps, self.schedule)
        multiple = self.critical_multiple(step, before)
        if multiple is None:
            return {}
        critical = multiple * rate
        return {
            "critical_sharpness": 2.0 / critical if critical else math.inf,
            "critical_learning_rate": critical,
        }

    @torch.no_grad()
    def critical_multiple(
        self, step: int, before: Mapping[torch.Tensor, torch.Tensor]
    ) -> float | None:
        """Return the multiple of the update from which on it raises the loss; None if there was no
        update, or no loss to compare with.
        """
        batches = list(measured_rows(self.batches, step - 1, self.settings.rows))
        after = self.masters()
        moved = {each: after[each] - start for each, start in before.items()}
        changes = sum(int(each.count_nonzero()) for each in moved.values())
        if not int(self.world.sum(torch.tensor([changes]))):
            return None
        weights = {each: local(each).clone() for each in before}
        with measuring(self.model, self.objective):
            try:
                return critical_multiple(
                    lambda multiple: self.loss_at(batches, before, moved, multiple)
                )
            finally:
                for parameter, weight in weights.items():
                    put(parameter, weight)

    def masters(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return a copy of this rank's trained weights in full precision, on their device."""
        self.optimizer.synchronize()
        return {
            each: local(self.optimizer.master(each)).to(local(each).device).clone()
            for each in self.model.parameters()
            if each.requires_grad
        }

    def loss_at(
        self,
        batches: list[Batch],
        before: Mapping[torch.Tensor, torch.Tensor],
        moved: Mapping[torch.Tensor, torch.Tensor],
        multiple: float,
    ) -> float:
        """Return the loss over all ranks' rows after a multiple of the update."""
        for parameter, weight in before.items():
            put(parameter, weight + multiple * moved[parameter])
        losses = [float(self.objective.loss(self.model, batch).objective) for batch in batches]
        rows = [len(batch.rows) for batch in batches]
        mean = sum(n * loss for n, loss in zip(rows, losses, strict=True)) / sum(rows)
        total = self.world.sum(torch.tensor([mean], dtype=torch.float64))
        return float(total) / self.world.size


def put(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    """Write a parameter's elements without a trace: the optimizer takes weights over that it sees
    somebody else write.
    """
    local(parameter).data.copy_(weight)


def critical_multiple(loss: Callable[[float], float]) -> float | None:
    """Return the smallest multiple of a step at which a loss is above that at 0.

    A bracket is found from 1 on, by factors of 4; between its ends the root of
    `(loss(s) - loss(0)) / s` is interpolated, which is a straight line if the loss is a parabola.

    Args:
        loss: The loss after a multiple of the step; not finite counts as above.

    Returns:
        The multiple; 0 where even the smallest step raises the loss, and the largest multiple that
        was tried where none does; None where the loss is not finite to begin with.
    """
    origin = loss(0.0)
    if not math.isfinite(origin):
        return None

    def rise(multiple: float) -> float:
        """The mean slope up to a multiple; infinite where the loss is not finite."""
        slope = (loss(multiple) - origin) / multiple
        return slope if math.isfinite(slope) else math.inf

    low, high = bracket(rise)
    if low is None:
        return 0.0
    if high is None:
        return low[0]
    for _ in range(REFINEMENTS):
        middle = crossing(low, high)
        found = (middle, rise(middle))
        low, high = (low, found) if found[1] > 0.0 else (found, high)
    return crossing(low, high)


Point = tuple[float, float]
"""A multiple of the step, and the mean slope up to it."""


def bracket(rise: Callable[[float], float]) -> tuple[Point | None, Point | None]:
    """Return neighbouring multiples, a factor of `GROWTH` apart, that lower and raise the loss;
    None for one that is not to be found.
    """
    first = (1.0, rise(1.0))
    low, high = (None, first) if first[1] > 0.0 else (first, None)
    while low is None and high is not None and high[0] > SMALLEST_MULTIPLE:
        point = (high[0] / GROWTH, rise(high[0] / GROWTH))
        low, high = (low, point) if point[1] > 0.0 else (point, high)
    while high is None and low is not None and low[0] < LARGEST_MULTIPLE:
        point = (low[0] * GROWTH, rise(low[0] * GROWTH))
        low, high = (low, point) if point[1] > 0.0 else (point, high)
    return low, high


def crossing(low: Point, high: Point) -> float:
    """Return where the straight line between two points crosses zero; their middle where the upper
    one is infinite.
    """
    if math.isinf(high[1]):
        return (low[0] + high[0]) / 2
    return low[0] - low[1] * (high[0] - low[0]) / (high[1] - low[1])
