"""Attention by torch's `scaled_dot_product_attention`, which picks cuDNN, flash or others.

First order only: the fused kernels have no double backward. Its causal path aligns the first
query with the first key, so lengths that differ take a mask; every mask but the causal one is built
whole, B x T x S booleans.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from interlace.kernels.attention.request import Request
from interlace.kernels.attention.scoring import Scoring, distance_bias, visible


def obstacle(request: Request) -> str | None:
    """Return why torch cannot serve a request, or None."""
    if "lse" in request.extras:
        return "it does not return the log-sum-exp (which sinks need too)"
    if "softcap" in request.extras:
        return "it has no soft cap"
    if "empty_rows" in request.extras:
        return "its kernels disagree on queries that see no key"
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, None]:
    """Return the output (B, H, T, K); see `reference`."""
    queries, keys = q.shape[2], k.shape[2]
    bounded = scoring.first is not None or scoring.kinds is not None or scoring.slopes is not None
    causal = scoring.right == 0 and scoring.left >= keys and queries == keys and not bounded
    last = queries == 1 and scoring.right == 0 and scoring.left >= keys and not bounded
    mask = None if causal or last else additive(scoring, q, k)
    # By branching, since a compiler that leaves lengths open makes comparisons symbols.
    is_causal = True if causal and queries > 1 else False  # noqa: SIM210
    groups = q.shape[1] // k.shape[1]
    # On CUDA masked attention over grouped heads has no dependable fused kernel (flash takes no
    # mask, memory-efficient no groups), and the math path would hold all scores.
    if groups > 1 and mask is not None and q.is_cuda:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    with without_bad_cells(q, mask):
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scoring.scale,
            enable_gqa=groups > 1,
        )  # fmt: skip
    return out, None


def additive(scoring: Scoring, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return mask and bias of all pairs as torch takes them, or None where there is neither."""
    mask = visible(scoring, q.shape[2], k.shape[2], q.device)
    bias = distance_bias(scoring, q.shape[2], k.shape[2], q.device)
    if bias is None:
        return mask
    bias = bias.to(q.dtype)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def known_bad(request: Request) -> str | None:
    """Return which of torch's kernels is known to be wrong for a request, or None."""
    if request.device == "cuda" and request.whole_mask and request.keys % 128 == 64:
        return (
            f"without cuDNN here: with a mask, its backward gives NaN where the number of keys "
            f"({request.keys}) modulo 128 is 64 (pytorch issue 196678)"
        )
    return None


def without_bad_cells(q: torch.Tensor, mask: torch.Tensor | None) -> AbstractContextManager[object]:
    """Return a context without kernels that are known to be wrong for these inputs.

    cuDNN's backward with a mask gives NaN where S % 128 == 64 (pytorch issue 196678).
    """
    if mask is not None and q.is_cuda and mask.shape[-1] % 128 == 64:
        return sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
    return nullcontext()
