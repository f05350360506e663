"""The one call for state-space duality: checks its inputs, picks a back end, says why.

A back end declares how often it can be differentiated. Asked for more it raises and names the
remedy; a gradient is never detached silently.
"""

import os
from typing import Literal, NamedTuple, overload

import torch
from torch.nn import functional

from interlace.kernels.ssd import chunked, operator, reference
from interlace.kernels.ssd.checks import Inputs, check, state_dtype
from interlace.kernels.ssd.chunks import number_documents
from interlace.kernels.triton_language import require_triton, why_no_triton

Backend = Literal["auto", "reference", "chunked", "triton"]

ORDERS: dict[str, int | Literal["any"]] = {"reference": "any", "chunked": "any", "triton": 1}
"""How often each back end can be differentiated."""

CHUNKS = {"reference": 1, "chunked": 64, "triton": 256}
"""Positions per chunk where the caller names none: short rows of decays suit a CPU's caches, and on
a GPU the states of fp32 that lie between chunks are most of what is read and written."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_STATES = 256


class Choice(NamedTuple):
    """A back end, and why it was chosen."""

    backend: Literal["reference", "chunked", "triton"]
    reason: str


@overload
def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: Literal[False] = False,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return y."""


@overload
def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: Literal[True],
    chunk: int | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the final states."""


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """State-space duality, the sequence mixer of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    A head's state follows state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T, and
    y_t = state_t C_t + D x_t, times silu(z_t) where z is given. States and decays are fp32 (fp64
    for fp64). A, D, dt and initial states may be in that dtype too, beside narrower x, B, C, z.

    Args:
        x: (B, T, H, P), fp64, fp32, bf16 or fp16; T at least 1.
        dt: (B, T, H), the steps, not negative (after bias and softplus).
        A: (H,), negative. Values are not checked: where dt A > 0 the state grows.
        B: (B, T, G, N); G divides H, and each group is shared by H / G heads that follow each
            other.
        C: (B, T, G, N).
        D: (H,) or (H, P), weight of x in the output.
        z: (B, T, H, P), gate.
        segment_ids: (B, T) integers: where the id changes a new document begins, with a state of
            zeros.
        initial_states: (B, H, P, N), before the first position; zeros by default.
        return_final_states: Also return the state after the last position of each row.
        chunk: Positions per chunk (for `triton` a power of two from 16); changes rounding only.
        backend: `reference` (the recurrence), `chunked` (plain torch), `triton` (GPU kernels,
            differentiable once), or `auto`: `triton` on a GPU where it can, else `chunked`.

    Returns:
        y (B, T, H, P) in the dtype of x; if asked for also the final states (B, H, P, N).

    Raises:
        ValueError: Shapes or devices do not agree, or an option is unknown or cannot be had.
        TypeError: A dtype is not one of the above.
        ImportError: `backend="triton"` without Triton; the message says what to install.
        RuntimeError: In backward, where a second derivative was asked of `triton`.
    """
    inputs = Inputs(x, dt, A, B, C, D, z, segment_ids, initial_states)
    check(inputs, chunk)
    y, final = compute(inputs, choose_backend(x, B, backend).backend, chunk)
    return (y, final) if return_final_states else y


def compute(
    inputs: Inputs, backend: Literal["reference", "chunked", "triton"], chunk: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the final states by the chosen back end."""
    x, dt, A, B, C, D, z, segment_ids, state = inputs
    size = CHUNKS[backend] if chunk is None else chunk
    if backend == "triton":
        y, final = operator.ssd(x, dt, A, B, C, D, segment_ids, state, size)
        return y if z is None else y * functional.silu(z), final
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    state = state.to(state_dtype(x.dtype))
    documents = None if segment_ids is None else number_documents(segment_ids)
    if backend == "reference":
        y, final = reference.ssd(x, dt, A, B, C, documents, state)
    else:
        y, final = chunked.ssd(x, dt, A, B, C, documents, state, size)
    return skip_and_gate(y, x, D, z).to(x.dtype), final


def skip_and_gate(
    y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    """Return `(y + D x) silu(z)` in the dtype of `y`, for (..., H, P)."""
    if D is not None:
        weight = D if D.ndim == 2 else D.unsqueeze(-1)
        y = y + weight.to(y.dtype) * x.to(y.dtype)
    return y if z is None else y * functional.silu(z.to(y.dtype))


def choose_backend(x: torch.Tensor, B: torch.Tensor, backend: Backend) -> Choice:
    """Return the back end that `ssd` takes for `x` and `B`, and the reason in words.

    Raises:
        ValueError: The back end is unknown, or cannot take these tensors.
        ImportError: Triton was asked for and is not installed.
    """
    if backend == "reference" or backend == "chunked":
        return Choice(backend, "asked for")
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend={backend!r}: must be 'auto', 'reference', 'chunked' or 'triton'")
    problem = triton_problem(x, B)
    if backend == "triton":
        if problem is not None:
            raise ValueError(f'ssd: backend="triton": {problem}; take backend="chunked"')
        require_triton('ssd with backend="triton"')
        return Choice("triton", "asked for")
    if not x.is_cuda:
        return Choice("chunked", "x is not on a GPU")
    problem = problem or why_no_triton()
    if problem is not None:
        return Choice("chunked", problem)
    return Choice("triton", "x is on a GPU")


def triton_problem(x: torch.Tensor, B: torch.Tensor) -> str | None:
    """Return why Triton's kernels cannot run on these tensors, or None where they can."""
    # The interpreter is for tests: slow, and never chosen by itself.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not interpreted:
        return f"x is on {x.device}, and the kernels need a GPU"
    if x.dtype not in TRITON_DTYPES:
        return f"x is {x.dtype}, and the kernels take float32, bfloat16 and float16"
    if B.shape[3] > TRITON_STATES:
        return f"B has {B.shape[3]} states, and the kernels take {TRITON_STATES} at most"
    return None
