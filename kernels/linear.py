"""A linear map whose forward mode does nothing in vain.

torch pushes a tangent through a product by two more, one of them with the weight's tangent, which
is zero where only the input moves; and reverse over forward takes that product's gradients as well
(torch 2.13: three products forward and five in reverse). Here value and tangent go through as twice
the rows of one product: two forward, four in reverse.
"""

import torch
from torch.autograd import forward_ad
from torch.nn import functional


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.T`, differentiable to any order, in forward mode too.

    Args:
        x: (..., in).
        weight: (out, in), of the same dtype.

    Returns:
        (..., out) in that dtype.
    """
    if torch.compiler.is_compiling():
        return functional.linear(x, weight)
    value, tangent = forward_ad.unpack_dual(x)
    if tangent is None or forward_ad.unpack_dual(weight).tangent is not None:
        return functional.linear(x, weight)
    both = functional.linear(torch.stack([value, tangent]), weight)
    return forward_ad.make_dual(both[0], both[1])


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The plain twin of `linear`: a sum of products."""
    return (x.unsqueeze(-2) * weight).sum(-1)
