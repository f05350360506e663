"""What coordinate clipping does to tensors: guard, cut, and count what it cut.

A formula in `rules` passes its gradient and its direction through a `Limit`, which changes one of
them or neither; so that one formula serves a rule with and without clipping. Every element is
treated by itself: the result is the same on any piece of a tensor.
"""

from collections.abc import Callable
from typing import Literal

import torch

Stage = Literal["gradient", "update"]
"""What is clipped: the gradient before momentum, or the direction that the learning rate scales."""

Count = int | torch.Tensor
"""A number of coordinates: an int, or on a GPU a 0-d int64 tensor that nobody has waited for."""


def as_it_is(values: torch.Tensor) -> torch.Tensor:
    """Return what is given."""
    return values


class Limit:
    """A threshold for one update of one piece of memory, and how many coordinates crossed it.

    Attributes:
        gradient: Cuts a gradient, any shape, into a new tensor; or returns it as it is.
        direction: Likewise for what the learning rate scales.
        finite: Where the gradient was finite, after `guard`.
        count: Coordinates that were cut, or were not finite, so far.
    """

    def __init__(self, stage: Stage | None = None, threshold: float = float("inf")) -> None:
        """With no stage nothing is cut."""
        self.threshold = threshold
        self.gradient: Callable[[torch.Tensor], torch.Tensor] = as_it_is
        self.direction: Callable[[torch.Tensor], torch.Tensor] = as_it_is
        if stage == "gradient":
            self.gradient = self.cut
        elif stage == "update":
            self.direction = self.cut
        self.count: Count = 0
        # What the guard counted is not counted again.
        self.finite: torch.Tensor | bool = True

    def guard(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a gradient with 0 where it is not finite; what is cut later has its shape."""
        self.finite = torch.isfinite(gradient)
        self.add(~self.finite)
        return torch.where(self.finite, gradient, 0.0)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """Return values with their magnitudes cut at the threshold; NaN stays."""
        # In the precision of the values, as kernels compare them.
        limit = torch.tensor(self.threshold, dtype=values.dtype, device="cpu")
        self.add((values.abs() > limit) & self.finite)
        return torch.clamp(values, -limit, limit)

    def add(self, crossed: torch.Tensor) -> None:
        """Count what is True."""
        found = crossed.sum()
        self.count = self.count + (found if found.is_cuda else int(found))
