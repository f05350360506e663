"""The Triton path of `causal_conv1d` as operators that torch knows: `torch.compile` traces over
them. Differentiable once; a second derivative raises.
"""

from typing import Any

import torch

# Triton is imported where the operators run, not here: a CPU has no need of it.


@torch.library.custom_op("interlace::causal_conv1d_forward", mutates_args=())
def conv1d_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """Return y (B, T, C)."""
    from interlace.kernels.conv1d.launch import Problem, run_forward

    with torch.cuda.device_of(x):
        return run_forward(Problem(x, weight, bias, documents, state, silu))


@conv1d_forward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("interlace::causal_conv1d_backward", mutates_args=())
def conv1d_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
    silu: bool,
    dy: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the gradients of x, weight, bias and state, in their dtypes; empty where absent."""
    from interlace.kernels.conv1d.launch import Problem, run_backward

    with torch.cuda.device_of(x):
        dx, d_weight, d_bias, d_state = run_backward(
            Problem(x, weight, bias, documents, state, silu), dy
        )
    return [
        dx,
        d_weight.to(weight.dtype),
        x.new_empty(0) if bias is None else d_bias.to(bias.dtype),
        x.new_empty(0) if state is None or d_state is None else d_state.to(state.dtype),
    ]


@conv1d_backward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
    silu: bool,
    dy: torch.Tensor,
) -> list[torch.Tensor]:
    return [
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    ]


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep the inputs for the backward pass."""
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the inputs of `conv1d_forward`, once.

    Raises:
        RuntimeError: The backward pass shall itself be differentiated (grad mode is on in here).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "causal_conv1d: a second derivative was asked for (create_graph=True), but the triton "
            'back end has only the first; call causal_conv1d(..., backend="shifted")'
        )
    x, weight, bias, documents, state = ctx.saved_tensors
    dx, d_weight, d_bias, d_state = conv1d_backward(x, weight, bias, documents, state, ctx.silu, dy)
    of_bias = None if bias is None else d_bias
    return dx, d_weight, of_bias, None, None if state is None else d_state, None


conv1d_forward.register_autograd(differentiate, setup_context=keep_inputs)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """Return y (B, T, C) in the dtype of x."""
    # One tap has no state.
    state = state if weight.shape[1] > 1 else None
    return conv1d_forward(x, weight, bias, documents, state, silu)
