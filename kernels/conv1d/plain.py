"""The causal depthwise convolution written as its formula, and as shifted sums.

Both are plain torch and can be differentiated to any order. A CPU runs the shifted sums: W passes
over the input, W at most a handful.
"""

import torch
from torch.nn import functional

# B batch, T time, C channels, W taps


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """Return the convolution (B, T, C) position by position.

    Args:
        x: (B, T, C).
        weight: (C, W); the last tap weighs the position itself.
        bias: (C,) or None.
        documents: (B, T) integers that grow by one at the first position of every document but the
            first of a row, which is 0; None where each row is one document.
        state: (B, W - 1, C), what came before the first document.
    """
    taps = weight.shape[1]
    rows: list[torch.Tensor] = []
    window = state
    for t in range(x.shape[1]):
        if documents is not None and t > 0:
            same = documents[:, t] == documents[:, t - 1]
            window = torch.where(same[:, None, None], window, 0.0)
        window = torch.cat([window, x[:, t : t + 1]], dim=1)
        rows.append((window * weight.T).sum(1))
        window = window[:, window.shape[1] - taps + 1 :]
    y = torch.stack(rows, dim=1)
    return y if bias is None else y + bias


def shifted(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    documents: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """Same as the reference, as a sum over taps."""
    length, taps = x.shape[1], weight.shape[1]
    long = torch.cat([state, x], dim=1)
    y = x * weight[:, -1]
    for back in range(1, taps):
        earlier = long[:, taps - 1 - back : taps - 1 - back + length]
        if documents is not None:
            earlier = torch.where(reaches(documents, back).unsqueeze(-1), earlier, 0.0)
        y = torch.addcmul(y, earlier, weight[:, taps - 1 - back])
    return y if bias is None else y + bias


def reaches(documents: torch.Tensor, back: int) -> torch.Tensor:
    """Return where (B, T) the position `back` earlier is of the same document; the state before the
    row is of the first.
    """
    earlier = functional.pad(documents, (back, 0))[:, : documents.shape[1]]
    return documents == earlier


def state_after(
    x: torch.Tensor, documents: torch.Tensor | None, state: torch.Tensor
) -> torch.Tensor:
    """Return the last W - 1 positions (B, W - 1, C) of the last document, zeros before it."""
    kept = state.shape[1]
    last = torch.cat([state, x], dim=1)[:, x.shape[1] :]
    if documents is None:
        return last
    numbers = functional.pad(documents, (kept, 0))[:, documents.shape[1] :]
    return torch.where((numbers == documents[:, -1:]).unsqueeze(-1), last, 0.0)
