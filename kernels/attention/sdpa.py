"""Attention by torch's `scaled_dot_product_attention`, which picks a fused kernel; first order
only.

The fused kernels have no double backward. torch's CPU and GPU kernels raise when a second
derivative is asked for; `interlace.kernels.attention` words the remedy before that (see `api`).
"""

import torch
from torch.nn import functional


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Same as the reference; `causal` without a mask takes the kernel's own causal path (T = S)."""
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
