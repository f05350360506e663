"""Second derivatives of a training loss along given directions, by Hessian-vector products.

Of the gradient g, kept as a graph, the slope <g, v> is differentiated once more: that is H v, at
the cost of one further backward pass and without the Hessian (Pearlmutter 1994, Fast exact
multiplication by the Hessian). Attention is asked for its second derivative (`order=2`), and
everything is in fp32 whatever the run computes in: in bfloat16 a second derivative is mostly
rounding.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from interlace.trainer.batches import Batch, StepBatches
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.language_model import Block
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Objective

Direction = Sequence[torch.Tensor]
"""One tensor per parameter, of its shape."""


def quadratic_forms(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], directions: Mapping[str, Direction]
) -> dict[str, float]:
    """Return `<v, H v> / <v, v>` of every direction v, H the Hessian of a loss.

    Args:
        loss: A scalar with a graph that can be differentiated twice.
        parameters: Leaves of the graph.
        directions: By name; a direction of zeros, which has no such number, is left out.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    forms: dict[str, float] = {}
    for name, direction in directions.items():
        square = inner(direction, direction)
        if square == 0.0:
            continue
        slope = torch.stack(
            [(g * v).sum() for g, v in zip(gradients, direction, strict=True)]
        ).sum()
        curved = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
        forms[name] = inner(direction, curved) / square
    return forms


def inner(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Return the inner product of two lists of tensors, summed in fp64."""
    pairs = zip(one, other, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


class CurvatureProbe(nn.Module):
    """A model with its objective, as a function of weights that `functional_call` puts in."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        batch: Batch,
        parameters: Sequence[torch.Tensor],
        directions: Mapping[str, Direction],
    ) -> dict[str, float]:
        """Return the quadratic forms of a batch's loss; all derivatives are taken in here, so that
        a backward pass that computes something again (the head does) finds the same weights.
        """
        loss = self.objective.loss(self.model, batch).objective
        return quadratic_forms(loss, parameters, directions)


def curvature_along(
    model: Model,
    objective: Objective,
    batches: Sequence[Batch],
    weights: Mapping[str, torch.Tensor],
    directions: Mapping[str, Direction],
) -> dict[str, float]:
    """Return `<v, H v> / <v, v>` of the mean loss over the rows of some batches.

    Args:
        model: Plain, on one rank; left as it is.
        objective: What is minimised.
        batches: Each as large as memory allows.
        weights: Where, by parameter name: detached, of the dtype to compute in.
        directions: By name, one tensor per entry of `weights`, in its order.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    probe = CurvatureProbe(model, objective)
    named = {f"model.{name}": leaf for name, leaf in leaves.items()}
    dtype = next(iter(leaves.values())).dtype
    rows = sum(len(batch.rows) for batch in batches)
    total = dict.fromkeys(directions, 0.0)
    with twice_differentiable(model, dtype), measuring(model, objective):
        for batch in batches:
            arguments = (batch, list(leaves.values()), directions)
            found = torch.func.functional_call(probe, named, arguments)
            total = {name: total[name] + len(batch.rows) / rows * found[name] for name in found}
    return total


@contextmanager
def twice_differentiable(model: Model, dtype: torch.dtype) -> Generator[None]:
    """Let every block compute in a dtype and with kernels that have a second derivative, and every
    layer run as it is written: what `torch.compile` and selective recomputation make of it can be
    differentiated once.
    """

    def ask_for_second(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(each, order=2) if isinstance(each, BlockContext) else each for each in arguments
        )

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    handles = [block.register_forward_pre_hook(ask_for_second) for block in blocks]
    usual, model.compute_dtype = model.compute_dtype, dtype
    wrapped = [(unit, unit.__dict__.pop("forward", None)) for unit in model.units]
    try:
        yield
    finally:
        for unit, forward in wrapped:
            if forward is not None:
                object.__setattr__(unit, "forward", forward)
        model.compute_dtype = usual
        for handle in handles:
            handle.remove()


@contextmanager
def measuring(model: Model, objective: Objective) -> Generator[None]:
    """Take losses that the run shall not notice: nothing is drawn, and what the objective remembers
    afterwards is what it remembered before. Every rank takes part.
    """
    remembered = {name: tensor.clone() for name, tensor in objective.state().items()}
    model.eval()
    try:
        yield
    finally:
        model.train()
        objective.restore(remembered)


def measured_rows(batches: StepBatches, step: int, rows: int) -> Iterator[Batch]:
    """Yield this rank's share of the first rows of a step, at most a micro-batch at a time; the
    same rows for every number of ranks that divides them, and every rank as many.

    Args:
        batches: The run's.
        step: From 0.
        rows: How many over all ranks, or all of the step if it has fewer.
    """
    plan, world = batches.plan, batches.world
    share = max(1, min(rows, plan.rows_per_step) // world.size)
    first = world.rank * share
    for start in range(first, first + share, plan.microbatch_rows):
        numbers = range(start, min(start + plan.microbatch_rows, first + share))
        yield batches.to_batch(batches.training.batch(step, numbers), step, numbers)
