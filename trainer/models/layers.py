"""The two leaf modules: a linear map and a norm whose fp32 weights are cast where they are used.

Casting at use keeps one code path for one process and for FSDP2, whose gathered weights already
come in the compute dtype. There are no biases.
"""

import torch
from torch import nn

from interlace.kernels import linear, rms_norm


class Linear(nn.Module):
    """`x @ weight.T` with weight (out, in) cast to the dtype of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in fp32, with a gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D)."""
        return rms_norm(x, self.weight, self.epsilon)
