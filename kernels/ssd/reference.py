"""State-space duality written as its recurrence: any dtype, any order of differentiation, one
position after the other.

A head keeps a state of P x N numbers. A position lets it decay, adds an outer product, and reads it
(Dao and Gu 2024, arXiv 2405.21060, equations 1 and 2 with the scalar decay of section 5):

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T        y_t = state_t C_t
"""

import torch

# B batch, T time, H heads, P head width, G groups of heads that share B and C, N state width


def advance(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one position reads, and the state after it.

    Args:
        state: (B, H, P, N); sets the dtype of everything.
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N).
        C: (B, G, N).

    Returns:
        y (B, H, P) and the state (B, H, P, N).
    """
    shared = state.shape[1] // B.shape[1]
    write, read = (
        shared_by.to(state.dtype).repeat_interleave(shared, dim=1) for shared_by in (B, C)
    )
    step = dt.to(state.dtype)
    decay = torch.exp(step * A.to(state.dtype))
    scaled = step.unsqueeze(-1) * x.to(state.dtype)
    state = decay[:, :, None, None] * state + scaled.unsqueeze(-1) * write.unsqueeze(-2)
    return (state @ read.unsqueeze(-1)).squeeze(-1), state


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    documents: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (B, T, H, P) without skip and gate, and the state (B, H, P, N) after the last
    position.

    Args:
        x: (B, T, H, P).
        dt: (B, T, H).
        A: (H,).
        B: (B, T, G, N).
        C: (B, T, G, N).
        documents: (B, T) integers that grow by one at the first position of every document but the
            first; None where each row is one document.
        state: (B, H, P, N), the state before the first position; sets the dtype of everything.
    """
    rows: list[torch.Tensor] = []
    for t in range(x.shape[1]):
        if documents is not None and t > 0:
            same = documents[:, t] == documents[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        y, state = advance(state, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        rows.append(y)
    return torch.stack(rows, dim=1), state
