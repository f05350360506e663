"""The one attention call of the project: checks, describes, picks a back end, and runs it."""

from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from interlace.kernels.attention.checks import check
from interlace.kernels.attention.dilation import dilated
from interlace.kernels.attention.options import Both, Options, describe
from interlace.kernels.attention.request import request_of
from interlace.kernels.attention.router import choose


class Choices(TypedDict, total=False):
    """The options that `attention` and `explain_attention` share; `attention` documents them."""

    causal: bool | None
    window: int | tuple[int, int] | None
    segment_ids: Both | None
    cu_seqlens: Both | None
    block_mask: Any
    dilation: int
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float | None


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    order: int = 1,
    backend: str = "auto",
    **options: Unpack[Choices],
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[True],
    order: int = 1,
    backend: str = "auto",
    **options: Unpack[Choices],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | None = None,
    window: int | tuple[int, int] | None = None,
    segment_ids: Both | None = None,
    cu_seqlens: Both | None = None,
    block_mask: Any = None,
    dilation: int = 1,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    order: int = 1,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, with every mask and every derivative the project needs.

    Query `i` of T is aligned with key `i + S - T` of S: the last query with the last key, as in
    decoding. Scores are `scale * q . k`; then comes the soft cap, then ALiBi, then the mask. A pair
    is seen only if every given option allows it. A query that sees no key gets zeros, and a
    log-sum-exp of minus infinity.

    Args:
        q: (B, H, T, K), fp64, fp32, bf16 or fp16.
        k: (B, G, S, K), G divides H: each key head serves H / G query heads.
        v: (B, G, S, K).
        causal: A query sees no key after the one it is aligned with. By default true, unless
            there is a `block_mask`, which then says it all.
        window: A query sees the last `window` keys up to the aligned one, itself included (and as
            many after it, if not causal); or a pair (keys before, keys after), -1 for all, as
            flash-attn takes it. With a dilation, counted in its steps.
        segment_ids: (B, S) integers: a position sees only positions of an equal segment; the
            queries' are the last T. Or a pair, (B, T) for queries and (B, S) for keys.
        cu_seqlens: (documents + 1,) integers, from 0 to the length: where packed documents begin,
            the same in every row. Or a pair, for queries and for keys; then the last query of each
            document is aligned with the last key of it.
        block_mask: A `torch.nn.attention.flex_attention.BlockMask`; blocks it hides cost nothing.
        dilation: A query sees only every `dilation`-th key, counted from the aligned one.
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118).
        alibi_slopes: (H,) floats: minus slope times distance is added to the scores (ALiBi,
            arXiv 2108.12409). Constants: no gradient.
        sinks: (H,) floats: one more logit in each head's softmax that has no value (attention
            sinks, arXiv 2309.17453, in the form of gpt-oss). Differentiable.
        scale: Factor on the products; 1 / sqrt(K) by default.
        return_lse: Return the log-sum-exp of the logits too, sinks included.
        order: How often the result will be differentiated; 1 admits kernels that have only the
            first derivative.
        backend: `auto`, or the name of one (`explain_attention` names and explains them). The
            environment variable INTERLACE_ATTENTION decides where this says `auto`.

    Returns:
        (B, H, T, K) in the dtype of `q`; with `return_lse` also (B, H, T) in fp32 (fp64 for fp64).
        Both are differentiable.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit, the back end is unknown, or the
            one that is named cannot serve the call.
        RuntimeError: In backward, where more derivatives are asked of a back end than it has.

    References: FlashAttention-2 (arXiv 2307.08691).
    """
    options = Options(
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        block_mask=block_mask,
        dilation=dilation,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        return_lse=return_lse,
    )
    return attend_as(q, k, v, options, order, backend)


def attend_as(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, order: int, backend: str
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute what `attention` was asked for."""
    check(q, k, v, options, order)
    chosen = choose(request_of(q, k, v, options, order), backend).backend
    if options.dilation == 1:
        out, lse = chosen.run(q, k, v, describe(q, k, options))
    else:
        moved, scoring, undo = dilated(q, k, v, options)
        out, lse = chosen.run(*moved, scoring)
        out = out.index_select(2, undo)
        lse = None if lse is None else lse.index_select(2, undo)
    if options.sinks is not None:
        assert lse is not None
        out, lse = with_sinks(out, lse, options.sinks)
    if not options.return_lse:
        return out
    assert lse is not None
    return out, lse


def with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one logit per head to a softmax that is already done: it only takes weight away."""
    extra = sinks.to(lse.dtype)[:, None]
    kept = torch.sigmoid(lse - extra).unsqueeze(-1)
    return (out * kept).to(out.dtype), torch.logaddexp(lse, extra)


def explain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool = False,
    order: int = 1,
    backend: str = "auto",
    **options: Unpack[Choices],
) -> str:
    """Return in words which back end `attention` would choose for the same arguments, and why."""
    asked = Options(return_lse=return_lse, **options)
    check(q, k, v, asked, order)
    return choose(request_of(q, k, v, asked, order), backend).explain()
