"""Update rules as objects: which moments they keep, their hyperparameters, and their formula.

`scalars` folds the hyperparameters of one step into the few numbers a kernel needs, in float64;
`plain` is the formula on whole tensors, readable and in any precision, which the kernels are tested
against.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from interlace.kernels.update.limit import Limit


class UpdateRule(Protocol):
    """What the engine needs to know of a rule; a plain attribute will do for a property."""

    @property
    def name(self) -> str:
        """Name in recipes and reports; selects the kernel."""
        ...

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the state tensors beside the weight, each of the weight's shape."""
        ...

    @property
    def scale_free(self) -> bool:
        """Whether the update is the same for a multiple of all gradients (but for epsilon), as of
        Adam: it decides how muP scales learning rates.
        """
        ...

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
    name = "adamw"
    moments = ("exp_avg", "exp_avg_sq")
    scale_free = True

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
        self.formula(weight, gradient, moments, number, hyper, Limit())

    def formula(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
        limit: Limit,
    ) -> None:
        """Update in place; a clipped gradient enters the first moment only (arXiv 2306.00204)."""
        (beta1, beta2), lr = hyper["betas"], float(hyper["lr"])
        first, second = moments
        first.mul_(beta1).add_(limit.gradient(gradient), alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        first_hat = first / (1.0 - beta1**number)
        second_hat = second / (1.0 - beta2**number)
        weight.mul_(1.0 - lr * hyper["weight_decay"])
        weight.sub_(lr * limit.direction(first_hat / (second_hat.sqrt() + hyper["eps"])))


def buffer_of(momentum: float) -> tuple[str, ...]:
    """Return the state that a rule with this momentum keeps: without momentum none."""
    return ("momentum_buffer",) if momentum else ()


def momentum_in(hyper: Mapping[str, Any], moments: tuple[str, ...]) -> float:
    """Return the momentum of a parameter group.

    Raises:
        ValueError: It needs a buffer, and the rule keeps none.
    """
    momentum = float(hyper["momentum"])
    if momentum and not moments:
        raise ValueError(
            f"momentum={momentum} in a parameter group: the rule was made with momentum=0.0 and "
            f"keeps no buffer for it; make the rule with momentum={momentum}"
        )
    return momentum


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as torch.optim.SGD (no dampening).

    Attributes:
        lr: Learning rate.
        momentum: Decay of the momentum buffer; with 0 there is no buffer, and no state at all.
        weight_decay: Added to the gradient, times the weight; or decoupled.
        nesterov: Look ahead along the momentum.
        decoupled: Shrink the weight itself by `lr` times the decay, as AdamW does (arXiv
            1711.05101, algorithm 1), so that the decay passes through no momentum and no clip.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    decoupled: bool = False
    name = "sgd"
    scale_free = False

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_least_zero(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True: needs a momentum of more than 0")

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return buffer_of(self.momentum)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups, with torch's names."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "nesterov": self.nesterov,
        }

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return keep, decay, momentum, share of gradient and of momentum in the update, lr."""
        lr, decay = float(hyper["lr"]), float(hyper["weight_decay"])
        nesterov, momentum = bool(hyper["nesterov"]), momentum_in(hyper, self.moments)
        return (
            1.0 - lr * decay if self.decoupled else 1.0,
            0.0 if self.decoupled else decay,
            momentum,
            1.0 if nesterov else 0.0,
            momentum if nesterov else 1.0,
            lr,
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
        self.formula(weight, gradient, moments, number, hyper, Limit())

    def formula(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
        limit: Limit,
    ) -> None:
        """Update in place; decay that is not decoupled joins the gradient after it is clipped."""
        lr, decay = float(hyper["lr"]), hyper["weight_decay"]
        momentum = momentum_in(hyper, self.moments)
        gradient = limit.gradient(gradient)
        if self.decoupled:
            weight.mul_(1.0 - lr * decay)
        else:
            gradient = gradient + decay * weight
        direction = gradient
        if moments:
            buffer = moments[0].mul_(momentum).add_(gradient)
            direction = gradient + momentum * buffer if hyper["nesterov"] else buffer
        weight.sub_(lr * limit.direction(direction))


@dataclass(frozen=True)
class Signum:
    """The sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434, algorithm 2).

    The sign of a sum is that of an average, so momentum accumulates as SGD's does. Where it is 0
    the weight stays, but for the decay.

    Attributes:
        lr: Learning rate: how far every weight moves.
        momentum: Decay of the momentum buffer; with 0 the sign of the gradient counts (signSGD),
            and there is no buffer.
        weight_decay: Decoupled decay per step, times `lr`.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    name = "signum"
    scale_free = True

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_least_zero(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return buffer_of(self.momentum)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the defaults of parameter groups."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    def scalars(self, number: int, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Return those of decoupled SGD that does not look ahead."""
        lr = float(hyper["lr"])
        keep, momentum = 1.0 - lr * hyper["weight_decay"], momentum_in(hyper, self.moments)
        return keep, 0.0, momentum, 0.0, 1.0, lr

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        """Update in place as the paper writes it."""
        self.formula(weight, gradient, moments, number, hyper, Limit())

    def formula(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
        limit: Limit,
    ) -> None:
        """Update in place; what an update clip cuts is a sign."""
        lr, momentum = float(hyper["lr"]), momentum_in(hyper, self.moments)
        direction = limit.gradient(gradient)
        if moments:
            direction = moments[0].mul_(momentum).add_(direction)
        weight.mul_(1.0 - lr * hyper["weight_decay"])
        weight.sub_(lr * limit.direction(direction.sign()))
