"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x**2) + epsilon) * weight` over the last dimension.

    Args:
        x: (..., D), any floating dtype; computed in fp32 at least.
        weight: (D,).
        epsilon: Added to the mean square.

    Returns:
        Same shape and dtype as `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(wide), weight.shape, weight.to(wide), epsilon).to(x.dtype)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The plain twin of `rms_norm`: the formula, in the input's own precision."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
