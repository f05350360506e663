"""The guard of back ends that have only a first derivative."""

from typing import Any

import torch

# torch declares Function's methods with a context first; with `setup_context` forward has none.
# pyright: reportIncompatibleMethodOverride=false


class FirstOrder(torch.autograd.Function):
    """Identity whose backward refuses to be recorded: what lies behind it has no second derivative.

    Some kernels raise by themselves when the second derivative is taken, others return a gradient
    that is cut off from the graph. Here both raise before anything is computed.
    """

    @staticmethod
    def forward(output: torch.Tensor, backend: str) -> torch.Tensor:
        """Return the output as it is."""
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
        """Keep the name for the message."""
        ctx.backend = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient on, unless it shall be differentiated (grad mode is on in here)."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention: a second derivative was asked for (create_graph=True), but the "
                f"{ctx.backend} back end has only the first; call attention(..., order=2), or "
                'name one that has more: backend="chunked"'
            )
        return grad_outputs[0], None


def first_order_only(output: torch.Tensor, backend: str) -> torch.Tensor:
    """Return the output of a first-order back end, marked."""
    marked = FirstOrder.apply(output, backend)
    assert isinstance(marked, torch.Tensor)
    return marked
