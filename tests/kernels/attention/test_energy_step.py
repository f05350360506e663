"""An energy-based model's inner step: parameters are trained through a gradient.

`y' = y - rate * dE(y; parameters)/dy` with attention inside the energy; then the loss of `y'` is
differentiated with respect to the parameters. A back end that loses second derivatives gets the
parameters' gradient wrong by most of its size, without an error.
"""

import pytest
import torch
from torch import nn

from interlace.kernels import attention
from interlace.kernels.attention import slices
from interlace.kernels.attention.triton import tuning

WIDTH, HEADS, LENGTH = 16, 2, 19


class Energy(nn.Module):
    """A number per position from one attention layer over candidates."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(WIDTH, WIDTH)] * 4
        self.matrices = nn.ParameterList(
            torch.randn(shape, generator=generator) * WIDTH**-0.5 for shape in shapes
        )

    def forward(self, y: torch.Tensor, backend: str) -> torch.Tensor:
        q, k, v = (
            (y @ matrix).unflatten(-1, (HEADS, -1)).transpose(1, 2) for matrix in self.matrices[:3]
        )
        mixed = attention(q, k, v, order=2, backend=backend).transpose(1, 2).flatten(2)
        return torch.tanh(mixed @ self.matrices[3]).square().sum()


def parameter_gradients(
    backend: str, dtype: torch.dtype, *, detached: bool = False
) -> torch.Tensor:
    """Return the gradient of all parameters after two descent steps."""
    energy = Energy().to(dtype)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(2, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    wanted = torch.randn(2, LENGTH, WIDTH, generator=generator).to(dtype)
    for _ in range(2):
        (slope,) = torch.autograd.grad(energy(y, backend), y, create_graph=not detached)
        y = y - 0.5 * slope
        if detached:
            y = y.requires_grad_()
    loss = (y - wanted).square().mean() + 1e-3 * energy(y, backend)
    found = torch.autograd.grad(loss, list(energy.parameters()))
    return torch.cat([gradient.flatten() for gradient in found]).double()


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_parameters_learn_through_the_descent(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(16, 16))
    monkeypatch.setattr(slices, "LEAST_QUERIES", 8)
    monkeypatch.setattr(slices, "SCORES_AT_ONCE", 1)
    exact = parameter_gradients("reference", torch.float64)
    found = parameter_gradients(backend, torch.float32)
    assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_the_step_needs_second_derivatives() -> None:
    """What the test above would measure of attention whose gradients are cut off."""
    exact = parameter_gradients("reference", torch.float64)
    cut_off = parameter_gradients("reference", torch.float64, detached=True)
    assert float((cut_off - exact).norm() / exact.norm()) > 0.5
