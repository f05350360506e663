"""The leaf modules: a linear map, a table, and a norm; fp32 weights are cast where they are used.

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


class Embedding(nn.Embedding):
    """A table of one row per token whose values, like all others, `Model.initialise` brings.

    Torch's would be drawn when it is made; on the meta device that loads the compiler, for a
    second of every start.
    """

    def reset_parameters(self) -> None:
        """Leave the table as it was allocated."""


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in fp32, with a gain.

    Attributes:
        multiplier: Factor on the gain. Before output matrices it follows the width under muP, so
            that their weights need not: it is what divides the logits.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon
        self.multiplier = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D)."""
        gain = self.weight if self.multiplier == 1.0 else self.weight * self.multiplier
        return rms_norm(x, gain, self.epsilon)
