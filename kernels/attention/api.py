"""The one attention call of the project: checks its inputs, builds the mask if one is needed,
picks a back end.
"""

import math
from typing import Literal

import torch

from interlace.kernels.attention import reference, sdpa

Backend = Literal["auto", "reference", "sdpa"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    segments: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Scaled dot-product attention with grouped key heads, causal and document masks.

    Args:
        q: (B, H, T, K), fp64, fp32, fp16 or bf16.
        k: (B, G, S, K), G divides H.
        v: (B, G, S, K).
        causal: Position sees itself and what came before; with T < S the queries are the last T
            positions. segments: (B, S) integers; a position sees only positions of equal segment.
            The queries'
            segments
            are the last T.
        scale: Factor on the scores; K ** -0.5 by default.
        backend: `sdpa` (torch's fused kernels, differentiable once), `reference` (plain, any
            order), or
            `auto`, which takes `sdpa`.

    Returns:
        (B, H, T, K) in the dtype of `q`.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or the back end is unknown.
        RuntimeError: A second derivative was asked of a back end that has only the first; use
            `backend="reference"`.
    """
    check_inputs(q, k, v, segments)
    length, total = q.shape[2], k.shape[2]
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    fused_causal = backend != "reference" and causal and segments is None and length == total
    mask = None if fused_causal else allowed(length, total, causal, segments, q.device)
    match backend:
        case "reference":
            return reference.attention(q, k, v, mask, factor)
        case "auto" | "sdpa":
            return FirstOrder.guard(sdpa.attention(q, k, v, mask, factor, causal=fused_causal))
        case _:
            raise ValueError(f"backend={backend!r}: must be 'auto', 'reference' or 'sdpa'")


class FirstOrder(torch.autograd.Function):
    """Identity whose backward refuses to be recorded: a fused kernel has no second derivative."""

    @staticmethod
    def guard(output: torch.Tensor) -> torch.Tensor:
        """Mark the output of a first-order back end."""
        marked = FirstOrder.apply(output)
        assert isinstance(marked, torch.Tensor)
        return marked

    @staticmethod
    def forward(ctx: object, output: torch.Tensor) -> torch.Tensor:
        """Return the output as it is."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it as Any
        """Pass the gradient on, unless a graph of it is wanted (grad mode is on inside
        backward).
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention: a second derivative was asked for (create_graph=True), but the sdpa "
                "back end "
                'has only the first; call attention(..., backend="reference")'
            )
        return grads[0]


def allowed(
    length: int, total: int, causal: bool, segments: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return the mask of allowed pairs, broadcastable to (B, H, T, S), or None where all are
    allowed.
    """
    mask = None
    if causal and length > 1:
        queries = torch.arange(total - length, total, device=device)
        mask = queries[:, None] >= torch.arange(total, device=device)[None, :]
    if segments is not None:
        same = (segments[:, -length:, None] == segments[:, None, :]).unsqueeze(1)
        mask = same if mask is None else same & mask
    return mask


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None
) -> None:
    """Raise `ValueError` where shapes, dtypes or devices do not agree."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes q (B, H, T, K), k and v (B, G, S, K); got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: batch, length or head width do not agree: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key heads: {shapes}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"attention: there are more queries than keys: {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"attention: one floating dtype is needed; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: one device is needed; got {q.device}, {k.device}, {v.device}")
    if segments is not None and segments.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"attention: segments must be (B, S) = {[k.shape[0], k.shape[2]]}; got "
            f"{list(segments.shape)}"
        )
