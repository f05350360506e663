"""One position of state-space duality, for decoding: the recurrence itself."""

import torch

from interlace.kernels.ssd.api import skip_and_gate
from interlace.kernels.ssd.checks import check_groups, check_tensors
from interlace.kernels.ssd.reference import advance


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and advance the state by one position (Dao and Gu 2024, arXiv 2405.21060).

    The next position of what `ssd(..., return_final_states=True)` began. A new document begins with
    a state of zeros. Plain torch, differentiable to any order.

    Args:
        state: (B, H, P, N), fp32 (fp64 where x is fp64), or the dtype of x.
        x: (B, H, P), fp64, fp32, bf16 or fp16.
        dt: (B, H), the step, not negative (after softplus); fp32 or the dtype of x.
        A: (H,), negative; fp32 or the dtype of x.
        B: (B, G, N) in the dtype of x; G divides H: heads h * H / G and on share group h.
        C: (B, G, N).
        D: (H,) or (H, P), weight of x in the output; fp32 or the dtype of x.
        z: (B, H, P), the output is multiplied by silu(z).

    Returns:
        y (B, H, P) in the dtype of x, and the new state (B, H, P, N) in the dtype of `state`.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: A dtype is not one of the above.
    """
    if x.ndim != 3:
        raise ValueError(f"ssd_step: x is {list(x.shape)}; it must be (B, H, P)")
    batch, heads, width = x.shape
    groups, states = check_groups("ssd_step", B, heads, dims=3)
    shapes = {
        "state": (state, (batch, heads, width, states)),
        "dt": (dt, (batch, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, groups, states)),
        "C": (C, (batch, groups, states)),
        "D": (D, (heads, width) if D is not None and D.ndim == 2 else (heads,)),
        "z": (z, (batch, heads, width)),
    }
    check_tensors("ssd_step", x, shapes, small=("state", "dt", "A", "D"))
    wide = torch.promote_types(x.dtype, torch.float32)
    y, new = advance(state.to(wide), x, dt, A, B, C)
    return skip_and_gate(y, x, D, z).to(x.dtype), new.to(state.dtype)
