"""Derivatives against finite differences, in fp64, for the input and every parameter by name.

A scalar is made of the output y by random weights w: the sum of w (y + y^2 / 2), whose gradient
depends on y, so that backward itself has something to be differentiated for. Along a direction u
its derivative is <gradient, u>; numerically it is a central difference of fourth order (weights -1,
8, -8, 1 over 12 h). Two directions are tried for each tensor: a random one, which any missing part
shows in, and that of the claimed gradient itself, which makes the difference large against
rounding. The second derivative is that of <gradient, v> for random v, in the same way.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from interlace.trainer.conformance.outcome import Outcome, exempt, judged
from interlace.trainer.conformance.subject import Subject, output_of
from interlace.trainer.models.context import Routed

ROWS, LENGTH = 2, 7
SPANS = (1e-2, 1e-3, 1e-4)
"""Lengths of the differences; the best counts, for rounding and curvature differ from mixer to
mixer, and a wrong gradient agrees with none.
"""

BOUND = 1e-4
"""Largest difference, as a share of the tensor's gradient; parts in fp32 leave about 1e-5."""

Scalar = Callable[[], torch.Tensor]


def first_derivative(subject: Subject) -> Outcome:
    """The gradient of the output is that of finite differences, for input and parameters."""
    module, x = subject.module(torch.float64), subject.rows(ROWS, LENGTH, torch.float64)
    named = tensors_of(module, x)
    worst = worst_difference(weighted_output(subject, module, x, 1), named)
    return verdict(
        worst, "look for `detach`, `.data`, `item`, in-place writes, or a custom backward"
    )


def second_derivative(subject: Subject) -> Outcome:
    """The gradient can be differentiated again, as often as is declared."""
    order = subject.kind.traits.order
    if order == 1:
        return exempt("it is declared to be differentiable once")
    module, x = subject.module(torch.float64), subject.rows(ROWS, LENGTH, torch.float64)
    named = tensors_of(module, x)
    output = weighted_output(subject, module, x, 2)
    generator = torch.Generator().manual_seed(4)
    weights = [drawn_like(tensor, generator) for tensor in named.values()]

    def weighted_gradient() -> torch.Tensor:
        gradients = gradients_of(output(), list(named.values()), again=True)
        pairs = zip(gradients, weights, strict=True)
        return torch.stack([(gradient * weight).sum() for gradient, weight in pairs]).sum()

    return verdict(
        worst_difference(weighted_gradient, named),
        "the backward itself must consist of differentiable operations (no `once_differentiable`, "
        "no `no_grad`); or declare Traits(order=1)",
    )


def tensors_of(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is differentiated for: the input and every parameter that takes gradients."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return {"the input": x.requires_grad_(), **trained}


def weighted_output(subject: Subject, module: nn.Module, x: torch.Tensor, order: int) -> Scalar:
    """Return a function whose value is a randomly weighted sum of the output, and of the loss of
    routing where there is one.
    """
    weight = subject.rows(ROWS, LENGTH, torch.float64, seed=3)

    def value() -> torch.Tensor:
        mixed = module(x, subject.context(x, order=order))
        y = output_of(mixed)
        value = ((y + 0.5 * y.square()) * weight).sum()
        return value + mixed.loss if isinstance(mixed, Routed) else value

    return value


def gradients_of(
    value: torch.Tensor, tensors: Sequence[torch.Tensor], *, again: bool = False
) -> list[torch.Tensor]:
    """Return the gradients of a scalar, zeros where it does not depend on a tensor."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(value, tensors, create_graph=again, allow_unused=True)
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(
            tensors, cast(tuple[torch.Tensor | None, ...], found), strict=True
        )
    ]


def worst_difference(value: Scalar, named: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest difference between claimed and numeric derivative, as a share of the
    tensor's gradient, and the tensor's name.
    """
    generator = torch.Generator().manual_seed(5)
    claimed = gradients_of(value(), list(named.values()))
    compared: dict[str, list[tuple[float, float]]] = {}
    for (name, tensor), gradient in zip(named.items(), claimed, strict=True):
        directions = [drawn_like(tensor, generator), gradient]
        units = [each / each.norm() for each in directions if float(each.norm()) > 0]
        compared[name] = [
            (float((gradient * unit).sum()), closest(value, tensor, unit, gradient))
            for unit in units
        ]
    largest = max(abs(exact) for pairs in compared.values() for _, exact in pairs)
    shares = {
        name: max(abs(said - exact) for said, exact in pairs)
        / max(*(abs(exact) for _, exact in pairs), 1e-3 * largest, 1e-30)
        for name, pairs in compared.items()
    }
    name = max(shares, key=lambda name: shares[name])
    return shares[name], name


def closest(
    value: Scalar, tensor: torch.Tensor, unit: torch.Tensor, gradient: torch.Tensor
) -> float:
    """Return the numeric derivative along a direction that comes nearest to the claimed one."""
    said = float((gradient * unit).sum())
    found = [difference(value, tensor, span * unit) / span for span in SPANS]
    return min(found, key=lambda exact: abs(exact - said))


def difference(value: Scalar, tensor: torch.Tensor, step: torch.Tensor) -> float:
    """Return the central difference of fourth order for one step, times the step's length."""
    total = 0.0
    start = tensor.detach().clone()
    for times, weight in ((2.0, -1.0), (1.0, 8.0), (-1.0, -8.0), (-2.0, 1.0)):
        tensor.data.copy_(start + times * step)
        total += weight * float(value().detach())
    tensor.data.copy_(start)
    return total / 12.0


def drawn_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normal numbers of a tensor's shape, fp64."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def verdict(worst: tuple[float, str], advice: str) -> Outcome:
    """Judge the largest difference."""
    share, name = worst
    return judged(
        share <= BOUND,
        f"{share:.1e} of the gradient, for {name}",
        f"{BOUND:.0e}",
        f"the derivative for {name} is wrong: {advice}",
    )
