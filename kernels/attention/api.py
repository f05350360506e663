"""The one attention call of the project: checks its inputs, builds the mask if one is needed,
picks a back end.

A fused back end has a first derivative only. Asked for a second one it raises and names the
remedy; a gradient is never detached silently.
"""

import math
from typing import Literal

import torch

from interlace.kernels.attention import reference, sdpa

Backend = Literal["auto", "reference", "sdpa"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        q: (B, H, T, K), fp64, fp32, bf16 or fp16.
        k: (B, G, S, K), G divides H: each key head serves H / G query heads.
        v: (B, G, S, K).
        causal: A position sees itself and what came before. With T < S the queries are the last T
            of the S positions, as in decoding.
        segments: (B, S) integers: a position sees only positions of an equal segment. The queries'
            segments are the last T.
        scale: Factor on the scores; 1 / sqrt(K) by default.
        backend: `sdpa` (torch's fused kernels, differentiable once), `reference` (plain, any
            order), or `auto`, which takes `sdpa`.

    Returns:
        (B, H, T, K) in the dtype of `q`.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or the back end is unknown.
        RuntimeError: In backward, where a second derivative was asked of a back end that has only
            the first; use `backend="reference"`.
    """
    if backend not in ("auto", "reference", "sdpa"):
        raise ValueError(f"backend={backend!r}: must be 'auto', 'reference' or 'sdpa'")
    check_inputs(q, k, v)
    check_segments(k, segments)
    length, total = q.shape[2], k.shape[2]
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    # The fused kernels' own causal path needs no mask, but aligns queries and keys at the start.
    fused_causal = backend != "reference" and causal and segments is None and length == total
    mask = None if fused_causal else allowed(length, total, causal, segments, q.device)
    if backend == "reference":
        return reference.attention(q, k, v, mask, factor)
    return FirstOrder.guard(sdpa.attention(q, k, v, mask, factor, causal=fused_causal))


class FirstOrder(torch.autograd.Function):
    """Identity whose backward refuses to be recorded: a fused kernel has no second derivative."""

    @staticmethod
    def guard(output: torch.Tensor) -> torch.Tensor:
        """Mark the output of a first-order back end."""
        marked = FirstOrder.apply(output)
        assert isinstance(marked, torch.Tensor)
        return marked

    @staticmethod
    def forward(output: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares the form with ctx only
        """Return the output as it is."""
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[object, ...], output: object) -> None:
        """Nothing is saved; torch.func transforms insist on this method."""

    @staticmethod
    def backward(ctx: object, *grad_outputs: torch.Tensor) -> torch.Tensor:
        """Pass the gradient on, unless it shall be differentiated (grad mode is on in here)."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention: a second derivative was asked for (create_graph=True), but the sdpa "
                'back end has only the first; call attention(..., backend="reference")'
            )
        return grad_outputs[0]


def allowed(
    length: int, total: int, causal: bool, segments: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return the mask of allowed pairs, broadcastable to (B, H, T, S), or None where all are
    allowed.
    """
    mask = None
    # A single query is the last position, which sees everything.
    if causal and length > 1:
        queries = torch.arange(total - length, total, device=device)
        mask = queries[:, None] >= torch.arange(total, device=device)[None, :]
    if segments is not None:
        same = segments[:, total - length :, None] == segments[:, None, :]
        mask = same.unsqueeze(1) if mask is None else same.unsqueeze(1) & mask
    return mask


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise `ValueError` where shapes, dtypes or devices of queries, keys and values do not
    agree.
    """
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes q (B, H, T, K), k and v (B, G, S, K); got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: batch, length or head width do not agree: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key heads: {shapes}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"attention: there are more queries than keys: {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            "attention: one dtype of float64, float32, bfloat16, float16 is needed; got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: one device is needed; got {q.device}, {k.device}, {v.device}")


def check_segments(k: torch.Tensor, segments: torch.Tensor | None) -> None:
    """Raise `ValueError` where the segments do not fit the keys."""
    if segments is None:
        return
    expected = [k.shape[0], k.shape[2]]
    if list(segments.shape) != expected:
        raise ValueError(
            f"attention: segments must be (B, S) = {expected}; got {list(segments.shape)}"
        )
    if segments.is_floating_point() or segments.is_complex():
        raise ValueError(f"attention: segments must be integers; got {segments.dtype}")
    if segments.device != k.device:
        raise ValueError(f"attention: segments are on {segments.device}, keys on {k.device}")
