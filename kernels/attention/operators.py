"""Attention's forward and backward as registered operators.

Compilers trace over an operator as one node, with fake tensors for shapes, and policies of
selective recomputation see it by name. Traced code has the first derivative only, which is all
that `torch.compile` supports; eager code goes through `differentiation`.
"""

import importlib
from typing import Any

import torch

from interlace.kernels.attention.scoring import Scoring

Tensor = torch.Tensor


def kernels_of(backend: str) -> Any:
    """Return the module with the four computations of a back end (see `chunked`)."""
    return importlib.import_module(f"interlace.kernels.attention.{backend}")


@torch.library.custom_op("interlace::attention_forward", mutates_args=())
def attention_forward(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
    diagonal: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    kinds: Tensor | None,
    pairs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output (B, H, T, K) and log-sum-exp (B, H, T); from `scale` on, a `Scoring`."""
    scoring = Scoring(
        scale, left, right, softcap, slopes, diagonal, first, last,
        query_segments, key_segments, kinds, pairs,
    )  # fmt: skip
    return kernels_of(backend).forward(q, k, v, scoring)


@attention_forward.register_fake
def _(backend: str, q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("interlace::attention_backward", mutates_args=())
def attention_backward(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
    diagonal: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    kinds: Tensor | None,
    pairs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    scoring = Scoring(
        scale, left, right, softcap, slopes, diagonal, first, last,
        query_segments, key_segments, kinds, pairs,
    )  # fmt: skip
    return kernels_of(backend).backward(q, k, v, out, lse, grad_out, grad_lse, scoring)


@attention_backward.register_fake
def _(backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward operator needs."""
    ctx.backend, q, k, v, *scoring = inputs
    tensors = [each for each in scoring if isinstance(each, Tensor)]
    ctx.scoring = [None if isinstance(each, Tensor) else each for each in scoring]
    ctx.places = [n for n, each in enumerate(scoring) if isinstance(each, Tensor)]
    ctx.save_for_backward(q, k, v, *output, *tensors)


def pull_back(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """Call the backward operator."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    scoring = list(ctx.scoring)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        scoring[place] = tensor
    saved = q, k, v, out, lse, grad_out, grad_lse
    found = torch.ops.interlace.attention_backward(ctx.backend, *saved, *scoring)
    return None, *found, *(None for _ in scoring)


attention_forward.register_autograd(pull_back, setup_context=keep)
