"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467): plain, of a residual
sum, and gated.

Computed in fp32 at least, whatever comes in. These are torch's own operations: on a GPU they are
compiled together with their neighbours, and a kernel of ours would have to beat that first
(benchmarks/step_ops.py measures it). Differentiable to any order.
"""

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

    Raises:
        TypeError: `x` is not floating.
        ValueError: `weight` is not (D,).
    """
    check(x, weight, "rms_norm")
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(wide), weight.shape, weight.to(wide), epsilon).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + residual`, the new residual, and its `rms_norm`.

    The norm is that of the sum as it is returned, rounded to its dtype: what a later block reads
    from the residual is what was normalised.

    Args:
        x: (..., D), any floating dtype: what a block adds to the residual.
        residual: As `x`; a wider residual makes a wider sum and norm.
        weight: (D,).
        epsilon: Added to the mean square.

    Raises:
        TypeError: `x` or `residual` is not floating.
        ValueError: Shapes do not agree.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: residual must have the shape of x, {list(x.shape)}; got "
            f"{list(residual.shape)}"
        )
    check(x, weight, "add_rms_norm")
    check(residual, weight, "add_rms_norm", "residual")
    total = x + residual
    return total, rms_norm(total, weight, epsilon)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float, *, groups: int = 1
) -> torch.Tensor:
    """Return the `rms_norm` of `x * silu(gate)`, each group of channels on its own.

    Mamba-2's output norm (Dao and Gu 2024, arXiv 2405.21060, section 7.1): gate first, then norm.
    With one group per tensor-parallel rank no statistic crosses ranks.

    Args:
        x: (..., D), any floating dtype; computed in fp32 at least.
        gate: As `x`.
        weight: (D,).
        epsilon: Added to the mean square.
        groups: Divides D; group `n` holds channels `n D / groups` to `(n + 1) D / groups`.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        TypeError: `x` or `gate` is not floating.
        ValueError: Shapes do not agree, or the groups do not divide the channels.
    """
    if x.shape != gate.shape:
        raise ValueError(
            f"gated_rms_norm: gate must have the shape of x, {list(x.shape)}; got "
            f"{list(gate.shape)}"
        )
    check(x, weight, "gated_rms_norm")
    check(gate, weight, "gated_rms_norm", "gate")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm: groups={groups} must divide D = {x.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(wide) * functional.silu(gate.to(wide))).unflatten(-1, (groups, -1))
    normed = functional.rms_norm(gated, gated.shape[-1:], None, epsilon).flatten(-2)
    return (normed * weight.to(wide)).to(x.dtype)


def check(x: torch.Tensor, weight: torch.Tensor, operation: str, name: str = "x") -> None:
    """Raise unless a weight fits the last dimension of a floating tensor."""
    if not x.is_floating_point():
        raise TypeError(f"{operation}: {name} must be floating; got {x.dtype}")
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{operation} takes {name} (..., D) and weight (D,); got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The plain twin of `rms_norm`: the formula, in the input's own precision."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def gated_rms_norm_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float, *, groups: int = 1
) -> torch.Tensor:
    """The plain twin of `gated_rms_norm`, group by group, in the input's own precision."""
    gated = x * gate * torch.sigmoid(gate)
    parts = zip(gated.chunk(groups, -1), weight.chunk(groups, -1), strict=True)
    return torch.cat([rms_norm_reference(part, gain, epsilon) for part, gain in parts], -1)
