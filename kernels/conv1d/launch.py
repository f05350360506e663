"""Runs the Triton kernels of the causal convolution on the current stream.

Sizes of blocks are constants: the kernels are bound by memory, and results do not depend on what
was measured.
"""

from typing import Any

import torch
import triton

from interlace.kernels.conv1d import kernels
from interlace.kernels.ssd.launch import by_rows, launch

ROWS, CHANNELS = 32, 64
"""Rows and channels of a block."""

STATE_ROWS = 8
"""Positions of a row that can see the state: a power of two that holds W - 1."""


class Problem:
    """Inputs and sizes of one call."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        documents: torch.Tensor | None,
        state: torch.Tensor | None,
        silu: bool,
    ) -> None:
        self.x, self.x_stride = by_rows(x)
        self.batch, self.length, self.channels = x.shape
        self.rows = self.batch * self.length
        self.taps = weight.shape[1]
        self.weight = weight.float().contiguous()
        # An absent tensor is never touched; any pointer stands in for it.
        self.bias = self.weight if bias is None else bias.float().contiguous()
        self.documents = self.weight if documents is None else documents.contiguous()
        self.state = self.weight if state is None else state.contiguous()
        self.has_state = state is not None
        self.options: dict[str, Any] = {
            "taps": self.taps,
            "silu": silu,
            "has_bias": bias is not None,
            "has_documents": documents is not None,
            "wide": CHANNELS,
        }

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What every kernel reads."""
        return self.x, self.weight, self.bias, self.state, self.documents

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes and the stride that every kernel takes."""
        return self.length, self.rows, self.channels, self.x_stride


def run_forward(problem: Problem) -> torch.Tensor:
    """Return y (B, T, C) in the dtype of x."""
    p = problem
    y = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    grid = (triton.cdiv(p.rows, ROWS), triton.cdiv(p.channels, CHANNELS))
    options: dict[str, Any] = {**p.options, "has_state": p.has_state, "block": ROWS}
    launch(kernels.forward, grid, *p.inputs, y, *p.sizes, **options)
    return y


def run_backward(
    problem: Problem, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x in its dtype, and in fp32 of weight (C, W), bias (C,) and state
    (B, W - 1, C), or None for the last.
    """
    p, dy = problem, dy.contiguous()
    blocks, across = triton.cdiv(p.rows, ROWS), triton.cdiv(p.channels, CHANNELS)
    dx = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    weights = torch.empty(blocks, p.taps, p.channels, dtype=torch.float32, device=dy.device)
    biases = torch.empty(blocks, p.channels, dtype=torch.float32, device=dy.device)
    options: dict[str, Any] = {**p.options, "has_state": p.has_state, "block": ROWS}
    options["num_warps"] = 8
    launch(
        kernels.backward, (blocks, across), dy, *p.inputs, dx, weights, biases, *p.sizes, **options
    )
    d_state = None
    if p.has_state:
        d_state = torch.empty(p.state.shape, dtype=torch.float32, device=dy.device)
        options = {**p.options, "block": STATE_ROWS}
        launch(
            kernels.state_gradient, (p.batch, across), dy, *p.inputs, d_state, *p.sizes, **options
        )
    return dx, weights.sum(0).T, biases.sum(0), d_state
