"""Attention written as its formula: any dtype, any order of differentiation, quadratic memory."""

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return `softmax(scale * q k^T) v` over the allowed pairs, with grouped key heads.

    Args:
        q: (B, H, T, K).
        k: (B, G, S, K), G divides H.
        v: (B, G, S, K).
        mask: Booleans that broadcast to (B, H, T, S), true where attention is allowed; None allows
            all pairs.
        scale: Factor on the scores.

    Returns:
        (B, H, T, K).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = scale * (q @ k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v
