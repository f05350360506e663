"""The calls for causal depthwise convolution: check the inputs, pick a back end, say why.

A back end declares how often it can be differentiated. Asked for more it raises and names the
remedy; a gradient is never detached silently.
"""

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple, overload

import torch
from torch.nn import functional

from interlace.kernels.conv1d import operator, plain
from interlace.kernels.ssd.checks import check_segments, check_tensors
from interlace.kernels.ssd.chunks import number_documents
from interlace.kernels.triton_language import require_triton, why_no_triton

Backend = Literal["auto", "reference", "shifted", "triton"]
Activation = Literal["none", "silu"]

ORDERS: dict[str, int | Literal["any"]] = {"reference": "any", "shifted": "any", "triton": 1}
"""How often each back end can be differentiated."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_TAPS = 8


class Choice(NamedTuple):
    """A back end, and why it was chosen."""

    backend: Literal["reference", "shifted", "triton"]
    reason: str


@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: Literal[False] = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return y."""


@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: Literal[True],
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the final states."""


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over time that sees only the past (as before the scan in Mamba, Gu and
    Dao 2023, arXiv 2312.00752, section 3.4).

    y_t = activation(sum_k weight_k x_{t-W+1+k} + bias), channel by channel, in fp32 (fp64 for
    fp64).

    Args:
        x: (B, T, C), fp64, fp32, bf16 or fp16; T at least 1.
        weight: (C, W), W at least 1; the last tap weighs the position itself. Weight and bias are
            in the dtype of x, or in fp32 (fp64) beside it.
        bias: (C,).
        activation: `none` or `silu`.
        segment_ids: (B, T) integers: where the id changes a new document begins, which sees nothing
            of what came before.
        initial_states: (B, W - 1, C) in the dtype of x, what came before the first document of each
            row, oldest first; zeros by default.
        return_final_states: Also return what the next position has to see.
        backend: `reference` (position by position), `shifted` (plain torch), `triton` (GPU kernels,
            differentiable once), or `auto`: `triton` on a GPU where it can, else `shifted`.

    Returns:
        y (B, T, C) in the dtype of x; if asked for also the final states (B, W - 1, C), which
        `causal_conv1d_step` and `initial_states` take.

    Raises:
        ValueError: Shapes or devices do not agree, or an option is unknown or cannot be had.
        TypeError: A dtype is not one of the above.
        ImportError: `backend="triton"` without Triton; the message says what to install.
        RuntimeError: In backward, where a second derivative was asked of `triton`.
    """
    check("causal_conv1d", x, weight, bias, activation, {"initial_states": initial_states})
    check_segments("causal_conv1d", x, segment_ids)
    documents = None if segment_ids is None else number_documents(segment_ids)
    chosen = choose_backend(x, weight, backend).backend
    state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    state = state if initial_states is None else initial_states
    if chosen == "triton":
        y = operator.causal_conv1d(x, weight, bias, documents, initial_states, activation == "silu")
    else:
        formula = plain.reference if chosen == "reference" else plain.shifted
        wide = torch.promote_types(x.dtype, torch.float32)
        offset = None if bias is None else bias.to(wide)
        y = formula(x.to(wide), weight.to(wide), offset, documents, state.to(wide))
        y = (functional.silu(y) if activation == "silu" else y).to(x.dtype)
    return (y, plain.state_after(x, documents, state)) if return_final_states else y


def causal_conv1d_step(
    state: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve one more position: the next of `causal_conv1d(..., return_final_states=True)`.

    Plain torch, differentiable to any order. A new document begins with a state of zeros.

    Args:
        state: (B, W - 1, C) in the dtype of x, the positions before, oldest first.
        x: (B, C).
        weight: (C, W).
        bias: (C,).
        activation: `none` or `silu`.

    Returns:
        y (B, C) in the dtype of x, and the new state.

    Raises:
        ValueError: Shapes or devices do not agree, or the activation is unknown.
        TypeError: A dtype is wrong.
    """
    if x.ndim != 2:
        raise ValueError(f"causal_conv1d_step: x is {list(x.shape)}; it must be (B, C)")
    check("causal_conv1d_step", x.unsqueeze(1), weight, bias, activation, {"state": state})
    window = torch.cat([state, x.unsqueeze(1)], dim=1)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(wide) * weight.to(wide).T).sum(1)
    y = y if bias is None else y + bias.to(wide)
    y = functional.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, 1:]


def choose_backend(x: torch.Tensor, weight: torch.Tensor, backend: Backend) -> Choice:
    """Return the back end that `causal_conv1d` takes, and the reason in words.

    Raises:
        ValueError: The back end is unknown, or cannot take these tensors.
        ImportError: Triton was asked for and is not installed.
    """
    if backend == "reference" or backend == "shifted":
        return Choice(backend, "asked for")
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend={backend!r}: must be 'auto', 'reference', 'shifted' or 'triton'")
    problem = triton_problem(x, weight)
    if backend == "triton":
        if problem is not None:
            raise ValueError(f'causal_conv1d: backend="triton": {problem}; take "shifted"')
        require_triton('causal_conv1d with backend="triton"')
        return Choice("triton", "asked for")
    if not x.is_cuda:
        return Choice("shifted", "x is not on a GPU")
    problem = problem or why_no_triton()
    if problem is not None:
        return Choice("shifted", problem)
    return Choice("triton", "x is on a GPU")


def triton_problem(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why Triton's kernels cannot run on these tensors, or None where they can."""
    # The interpreter is for tests: slow, and never chosen by itself.
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {x.device}, and the kernels need a GPU"
    if x.dtype not in TRITON_DTYPES:
        return f"x is {x.dtype}, and the kernels take float32, bfloat16 and float16"
    if weight.shape[1] > TRITON_TAPS:
        return f"weight has {weight.shape[1]} taps, and the kernels take {TRITON_TAPS} at most"
    return None


def check(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    states: Mapping[str, torch.Tensor | None],
) -> None:
    """Raise `ValueError` or `TypeError` where something does not fit `x` (B, T, C)."""
    if activation not in ("none", "silu"):
        raise ValueError(f"activation={activation!r}: must be 'none' or 'silu'")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{operation}: x is {list(x.shape)}; it must be (B, T, C), none of them 0")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(
            f"{operation}: weight is {list(weight.shape)}; it must be (C, W) with C = {channels} "
            "as in x, and W at least 1"
        )
    kept = weight.shape[1] - 1
    shapes = {
        "weight": (weight, tuple(weight.shape)),
        "bias": (bias, (channels,)),
        **{name: (state, (batch, kept, channels)) for name, state in states.items()},
    }
    check_tensors(operation, x, shapes, small=("weight", "bias"))
