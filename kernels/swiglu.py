"""The gate of SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up`, in fp32 at least.

Autograd would keep `silu(gate)` for the backward pass, in fp32 where the arithmetic is; only the
inputs are kept here, and the backward pass computes it again. Differentiable to any order.
"""

from typing import Any

import torch
from torch.nn import functional


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`.

    Args:
        gate: (...), any floating dtype.
        up: Same shape and dtype.

    Returns:
        Same shape and dtype.

    Raises:
        TypeError: The dtypes differ or are not floating.
        ValueError: The shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: up must have the shape of gate, {list(gate.shape)}; got {list(up.shape)}"
        )
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise TypeError(
            f"swiglu: gate and up must be of one floating dtype; got {gate.dtype} and {up.dtype}"
        )
    result = GatedProduct.apply(gate, up)
    assert isinstance(result, torch.Tensor)
    return result


class GatedProduct(torch.autograd.Function):
    """`silu(gate) * up`; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        ctx.save_for_backward(gate, up)
        # Types are promoted inside the product; a cast of `up` would be a copy.
        return (functional.silu(widened(gate)) * up).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both gradients, to be differentiated again where that is asked for."""
        (gradient,) = grad_outputs
        gate, up = ctx.saved_tensors
        wide, of_product = widened(gate), widened(gradient)
        of_gate = silu_gradient(of_product * up, wide)
        of_up = of_product * functional.silu(wide)
        return of_gate.to(gate.dtype), of_up.to(up.dtype)


def silu_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `silu(x)`: in one operation, or, with `create_graph=True`, in those
    that can be differentiated again.
    """
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(gradient, x)
    share = torch.sigmoid(x)
    return gradient * share * (1.0 + x * (1.0 - share))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The plain twin of `swiglu`: the formula, in the input's own precision."""
    return gate * torch.sigmoid(gate) * up
