"""One step of descent on the energy, and its derivative with respect to everything.

A step from logits y is `y' = p - rate * dE/dp` with p = softmax(y): the published step overwrites
the logits by their softmax. Or it is `y' = y - rate * dE/dy`. Training needs the derivative of
that, a second derivative of E. `plain_step` leaves it to torch (`create_graph=True`), which keeps a
graph of everything; `graph_free_step` keeps y and nothing else. With a cotangent c of y',

    <c, rate * dE/dp> = rate * (derivative of E along c) = rate * D(c)

so backward runs the energy once in forward mode, with c as the tangent, and once in reverse from
D(c), which gives the share of candidates, observed keys and values, and weights alike; D(c) itself
is the share of the rate, negated. A candidate meets no other candidate, so the energies of all
positions go through this together.

Tangents are passed from stage to stage as tensors, forward mode being opened inside each: so a
stage can be recomputed, as a pair of value and tangent, like any other function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch.autograd import forward_ad

from interlace.trainer.models.energy.candidates import Stage

# torch declares Function's methods with any arguments; these say which.
# pyright: reportIncompatibleMethodOverride=false

Base = Literal["probabilities", "logits"]
Function = Callable[..., Any]
Recompute = Callable[[Function], Function]
"""Makes a function that keeps its inputs only, for activation checkpointing; or does nothing."""


class Landscape(Protocol):
    """The energy of candidates in one step."""

    @property
    def recompute(self) -> Recompute:
        """How activation checkpointing wraps a stage."""
        ...

    def stages(self, observed: Sequence[torch.Tensor], order: int) -> list[Stage]:
        """Return the way from probabilities (B, T, V) to energies (B, T) before observed keys and
        values, differentiable `order` times.
        """
        ...

    def weights(self) -> list[torch.Tensor]:
        """Return the parameters that the stages read."""
        ...


@dataclass(frozen=True)
class Slope:
    """What a step descends.

    Attributes:
        landscape: The energy.
        observed: Keys and values of all attention blocks in turn.
        rates: Step sizes, (B or 1, T or 1, 1).
        base: What the gradient is subtracted from.
    """

    landscape: Landscape
    observed: Sequence[torch.Tensor]
    rates: torch.Tensor
    base: Base


class Step(NamedTuple):
    """What one step comes to.

    Attributes:
        logits: After the step, (B, T, V).
        energies: Before the step, (B, T), without a graph.
        gradient_norms: Length of each candidate's gradient, (B, T), without a graph.
    """

    logits: torch.Tensor
    energies: torch.Tensor
    gradient_norms: torch.Tensor


def plain_step(logits: torch.Tensor, slope: Slope) -> Step:
    """Return a step whose derivative is torch's own; (B, T, V) to (B, T, V)."""
    kept = torch.is_grad_enabled()
    with torch.enable_grad():
        logits = logits if kept else logits.detach()
        point = logits if slope.base == "logits" else logits.softmax(-1)
        point = point if point.requires_grad else point.detach().requires_grad_()
        given = point.softmax(-1) if slope.base == "logits" else point
        energies = energies_of(slope.landscape, slope.observed, given, 2 if kept else 1)
        (gradient,) = torch.autograd.grad(energies.sum(), point, create_graph=kept)
        after = point - slope.rates * gradient
    energies, norms = energies.detach(), gradient.detach().norm(dim=-1)
    return Step(after if kept else after.detach(), energies, norms)


def graph_free_step(logits: torch.Tensor, slope: Slope) -> Step:
    """Return the same step, keeping `logits` alone for its derivative."""
    given = (*slope.observed, *slope.landscape.weights())
    found = GraphFreeStep.apply(logits, slope.rates, slope.landscape, slope.base, *given)
    return Step(*cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], found))


class GraphFreeStep(torch.autograd.Function):
    """A step as one operation; its inputs hold the observed keys and values, then the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        rates: torch.Tensor,
        landscape: Landscape,
        base: Base,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take the step; the graph of its first derivative is gone afterwards."""
        ctx.landscape, ctx.base, ctx.weights = landscape, base, len(landscape.weights())
        observed = tensors[: len(tensors) - ctx.weights]
        ctx.save_for_backward(logits, rates, *observed)
        with torch.no_grad():
            step = plain_step(logits, Slope(landscape, observed, rates, base))
        ctx.mark_non_differentiable(step.energies, step.gradient_norms)
        return step.logits, step.energies, step.gradient_norms

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Run the energy in forward mode along the cotangent, and in reverse from there."""
        logits, rates, *observed = ctx.saved_tensors
        cotangent, landscape = cotangents[0], cast(Landscape, ctx.landscape)
        leaves = [each.detach().requires_grad_() for each in observed]
        chained = ctx.needs_input_grad[0]
        with torch.enable_grad():
            point, given, tangent = dual_input(logits, cotangent, ctx.base, chained)
            moved = derivative_along(landscape, leaves, given, tangent)
        inputs = [*([point] if chained else []), *leaves, *landscape.weights()]
        scaled = rates.squeeze(-1).expand_as(moved)
        found = torch.autograd.grad(moved, inputs, scaled, allow_unused=True)
        found = cast(Sequence[torch.Tensor | None], found)
        shares = [None if each is None else -each for each in found]
        of_logits = None
        if chained:
            of_logits = through_softmax(given.detach(), cotangent, shares.pop(0), ctx.base)
        of_rates = -moved.detach().unsqueeze(-1).to(rates.dtype).sum_to_size(rates.shape)
        return of_logits, of_rates, None, None, *shares


def dual_input(
    logits: torch.Tensor, cotangent: torch.Tensor, base: Base, chained: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the derivative is taken of, the probabilities, and their tangent."""
    point = logits.detach()
    if base == "probabilities":
        point = point.softmax(-1)
    point.requires_grad_(chained)
    if base == "probabilities":
        return point, point, cotangent
    given = point.softmax(-1)
    # Written out: torch's own tangent of a softmax cannot be differentiated (torch 2.13).
    return point, given, given * (cotangent - (given * cotangent).sum(-1, keepdim=True))


def through_softmax(
    probabilities: torch.Tensor, cotangent: torch.Tensor, share: torch.Tensor | None, base: Base
) -> torch.Tensor:
    """Return the cotangent of the logits, given that of the step and the energy's share of it."""
    total = cotangent if share is None else cotangent + share
    if base == "logits":
        return total
    return probabilities * (total - (probabilities * total).sum(-1, keepdim=True))


def energies_of(
    landscape: Landscape, observed: Sequence[torch.Tensor], given: torch.Tensor, order: int
) -> torch.Tensor:
    """Return the energies (B, T) of probabilities (B, T, V), in fp32 at least."""
    for stage in landscape.stages(observed, order):
        given = landscape.recompute(stage)(given)
    return given


def derivative_along(
    landscape: Landscape,
    observed: Sequence[torch.Tensor],
    given: torch.Tensor,
    tangent: torch.Tensor,
) -> torch.Tensor:
    """Return the derivatives of the energies (B, T) along a tangent (B, T, V), differentiable."""
    for stage in landscape.stages(observed, 2):
        given, tangent = landscape.recompute(partial(pushed, stage))(given, tangent)
    return tangent


def pushed(
    stage: Stage, value: torch.Tensor, tangent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value and tangent behind a stage."""
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(stage(forward_ad.make_dual(value, tangent)))
        # Reverse runs when the level is closed: its own operations must carry no tangents.
        assert result.tangent is not None, "every stage depends on what it is given"
        return result.primal, result.tangent
