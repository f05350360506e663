"""Update rules as objects: which moments they keep, their hyperparameters, and their formula.

`scalars` folds the hyperparameters of one step into the few numbers a kernel needs, in float64;
`plain` is the formula on whole tensors, readable and in any precision, which the kernels are tested
against.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch


class UpdateRule(Protocol):
    """What the engine needs to know of a rule."""

    name: ClassVar[str]
    """Name in recipes and reports; selects the kernel."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the state tensors beside the weight, each of the weight's shape."""

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups."""
        ...

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the kernel's scalars for update `number` (from 1)."""
        ...

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        """Update weight and moments in place, all of one floating dtype."""
        ...


def check_least_zero(**values: float) -> None:
    """Raise `ValueError` for a value below zero."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"{name}={value}: must be 0 or more")


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).

    Attributes:
        lr: Learning rate.
        betas: Decay of first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay per step, times `lr`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    name: ClassVar[str] = "adamw"
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_least_zero(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: each must be at least 0 and less than 1")

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups, with torch's names."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return keep, beta1, 1-beta1, beta2, 1-beta2, 1/sqrt(correction 2), eps, step size."""
        beta1, beta2 = hyper["betas"]
        lr = float(hyper["lr"])
        return (
            1.0 - lr * hyper["weight_decay"],
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / math.sqrt(1.0 - beta2**number),
            hyper["eps"],
            lr / (1.0 - beta1**number),
        )

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        """Update in place as the paper writes it."""
        (beta1, beta2), lr = hyper["betas"], float(hyper["lr"])
        first, second = moments
        first.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        first_hat = first / (1.0 - beta1**number)
        second_hat = second / (1.0 - beta2**number)
        weight.mul_(1.0 - lr * hyper["weight_decay"])
        weight.sub_(lr * first_hat / (second_hat.sqrt() + hyper["eps"]))


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as torch.optim.SGD (no dampening).

    Attributes:
        lr: Learning rate.
        momentum: Decay of the momentum buffer; every group keeps a buffer, also with 0.
        weight_decay: Added to the gradient, times the weight.
        nesterov: Look ahead along the momentum.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    name: ClassVar[str] = "sgd"
    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_least_zero(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True: needs a momentum of more than 0")

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups, with torch's names."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "nesterov": self.nesterov,
        }

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return decay, momentum, share of gradient and of momentum in the update, lr."""
        nesterov, momentum = bool(hyper["nesterov"]), float(hyper["momentum"])
        return (
            hyper["weight_decay"],
            momentum,
            1.0 if nesterov else 0.0,
            momentum if nesterov else 1.0,
            float(hyper["lr"]),
        )

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        """Update in place as torch documents it."""
        (buffer,), momentum = moments, hyper["momentum"]
        gradient = gradient + hyper["weight_decay"] * weight
        buffer.mul_(momentum).add_(gradient)
        direction = gradient + momentum * buffer if hyper["nesterov"] else buffer
        weight.sub_(float(hyper["lr"]) * direction)
