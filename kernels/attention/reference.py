"""Attention written as its formula: any dtype, any order of differentiation, quadratic memory."""

import torch

from interlace.kernels.attention.scoring import Scoring, distance_bias, visible


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `softmax(logits) v` and the log-sum-exp of the logits.

    Args:
        q: (B, H, T, K).
        k: (B, G, S, K), G divides H.
        v: (B, G, S, K).
        scoring: What the logits are.

    Returns:
        (B, H, T, K) in the dtype of `q`, and (B, H, T) in fp32 at least. A query that sees no key
        gets zeros and minus infinity.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = scoring.scale * (q @ k.transpose(-1, -2))
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    bias = distance_bias(scoring, q.shape[2], k.shape[2], q.device)
    if bias is not None:
        scores = scores + bias
    mask = visible(scoring, q.shape[2], k.shape[2], q.device)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if mask is None:
        return (scores.softmax(-1) @ v).to(q.dtype), scores.to(wide).logsumexp(-1)
    # A row without any key would be 0/0: it gets a harmless score, and weights of zero afterwards.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0).to(v.dtype)
    lse = scores.to(wide).logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return weights @ v, lse
