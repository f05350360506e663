"""Attention by torch's `scaled_dot_product_attention`, which picks a fused kernel.

First order only: the fused kernels have no double backward. With `create_graph=True` torch itself
raises "derivative ... is not implemented" when the second derivative is taken (seen on CPU in torch
2.13); `interlace.kernels.attention` raises earlier and names the remedy.
"""

import torch
from torch.nn import functional


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Same as the reference; `causal` takes the kernel's own causal path (T = S, no mask)."""
    groups = q.shape[1] // k.shape[1]
    # On CUDA masked attention over grouped heads has no dependable fused kernel (flash takes no
    # mask, memory-efficient no groups), and the math path would hold all scores.
    if groups > 1 and mask is not None and q.is_cuda:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )
