"""The Triton path of `ssd` as operators that torch knows: `torch.compile` traces over them.

Forward and backward are one operator each, with shapes that depend on the inputs' shapes only (how
many chunks a batch of documents has stays inside). Differentiable once; a second derivative raises.
"""

from typing import Any

import torch

# Triton is imported where the operators run, not here: a CPU has no need of it.


@torch.library.custom_op("interlace::ssd_forward", mutates_args=())
def ssd_forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the final states; D is (H, P)."""
    from interlace.kernels.ssd.launch import Problem, run_forward

    with torch.cuda.device_of(x):
        problem = Problem(x, dt, A, B, C, D, segment_ids, chunk)
        return run_forward(problem, initial_states)


@ssd_forward.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, width = x.shape
    final = x.new_empty(batch, heads, width, B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), final


@torch.library.custom_op("interlace::ssd_backward", mutates_args=())
def ssd_backward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    chunk: int,
    dy: torch.Tensor,
    final_gradient: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the gradients of x, dt, A, B, C, D and the initial states, in the inputs' dtypes.

    Those of an absent D are empty, those of absent initial states are there all the same.
    """
    from interlace.kernels.ssd.launch import Problem, run_backward

    with torch.cuda.device_of(x):
        problem = Problem(x, dt, A, B, C, D, segment_ids, chunk)
        found = run_backward(problem, initial_states, dy, final_gradient)
    start = found.initial_states
    return [
        found.x,
        found.dt.to(dt.dtype),
        found.A.to(A.dtype),
        found.B.to(B.dtype),
        found.C.to(C.dtype),
        x.new_empty(0) if D is None or found.D is None else found.D.to(D.dtype),
        start if initial_states is None else start.to(initial_states.dtype),
    ]


@ssd_backward.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    chunk: int,
    dy: torch.Tensor,
    final_gradient: torch.Tensor,
) -> list[torch.Tensor]:
    start = torch.empty_like(final_gradient)
    if initial_states is not None:
        start = final_gradient.new_empty(final_gradient.shape, dtype=initial_states.dtype)
    skip = x.new_empty(0) if D is None else D.new_empty(D.shape)
    return [*(tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C)), skip, start]


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keep the inputs for the backward pass; everything else is computed again."""
    *tensors, chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.chunk = chunk


def differentiate(
    ctx: Any, dy: torch.Tensor, final_gradient: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the inputs of `ssd_forward`, once.

    Raises:
        RuntimeError: The backward pass shall itself be differentiated (grad mode is on in here).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ssd: a second derivative was asked for (create_graph=True), but the triton back end "
            'has only the first; call ssd(..., backend="chunked")'
        )
    x, dt, A, B, C, D, segment_ids, initial_states = ctx.saved_tensors
    dx, d_dt, dA, dB, dC, dD, start = ssd_backward(
        x, dt, A, B, C, D, segment_ids, initial_states, ctx.chunk, dy, final_gradient
    )
    skip = None if D is None else dD
    return dx, d_dt, dA, dB, dC, skip, None, None if initial_states is None else start, None


ssd_forward.register_autograd(differentiate, setup_context=keep_inputs)


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y with skip and without gate, in the dtype of x, and the final states in fp32."""
    skip = D
    if D is not None and D.ndim == 1:
        skip = D.unsqueeze(-1).expand(-1, x.shape[3])
    return ssd_forward(x, dt, A, B, C, skip, segment_ids, initial_states, chunk)
