"""The gate of SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up`, in fp32 at least.

Autograd would keep `silu(gate)` for the backward pass, in fp32 where the arithmetic is; only the
inputs are kept here, and the backward pass computes it again. Differentiable to any order, in
forward mode too, and the tangent can be differentiated in turn.
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
    product = GatedProduct if torch.compiler.is_compiling() else PushedGatedProduct
    result = product.apply(gate, up)
    assert isinstance(result, torch.Tensor)
    return result


class GatedProduct(torch.autograd.Function):
    """`silu(gate) * up`; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        ctx.save_for_backward(gate, up)
        # Types are promoted inside the product; a cast of `up` would be a copy.
        product = functional.silu(widened(gate)) * up
        # Nothing that returns its own input comes last, no cast to the same dtype and no operation
        # in place: under torch.compile of torch 2.11 all gradients would be zero.
        return product if product.dtype == gate.dtype else product.to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both gradients, to be differentiated again where that is asked for."""
        (gradient,) = grad_outputs
        gate, up = ctx.saved_tensors
        wide, of_product = widened(gate), widened(gradient)
        # With create_graph=True, and only then, gradients are recorded here.
        if torch.is_grad_enabled():
            share = torch.sigmoid(wide)
            of_gate = of_product * up * share * (1.0 + wide * (1.0 - share))
            of_up = of_product * wide * share
        else:
            of_gate = torch.ops.aten.silu_backward(of_product * up, wide)
            of_up = functional.silu(wide).mul_(of_product)
        return of_gate.to(gate.dtype), of_up.to(up.dtype)


class PushedGatedProduct(GatedProduct):
    """The same with a forward mode, over which compilers cannot trace."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        ctx.save_for_forward(gate, up)
        return GatedProduct.forward(ctx, gate, up)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> torch.Tensor:
        """Push tangents of gate and up, either of which may be absent, forward."""
        along_gate, along_up = grad_inputs
        gate, up = ctx.saved_tensors
        wide = widened(gate)
        share = torch.sigmoid(wide)
        tangent = torch.zeros_like(wide)
        if along_gate is not None:
            tangent = along_gate * up * share * (1.0 + wide * (1.0 - share))
        if along_up is not None:
            tangent = tangent + along_up * wide * share
        return tangent.to(gate.dtype)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The plain twin of `swiglu`: the formula, in the input's own precision."""
    return gate * torch.sigmoid(gate) * up
