"""Attention by Dao-AILab's `flash-attn` package, if the user has installed it (FlashAttention-2,
arXiv 2307.08691).

First order only: differentiated twice the package returns gradients that are cut off from the
graph, without an error; the guard stands around it. Its layout is (B, T, H, K).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from interlace.kernels.attention.first_order import first_order_only
from interlace.kernels.attention.measurements import constant
from interlace.kernels.attention.request import Request
from interlace.kernels.attention.scoring import Scoring
from interlace.kernels.attention.shared import made_once

OLDEST = (2, 6)
"""The first version with a soft cap."""

OLDEST_GPU = "sm80"

Tensor = torch.Tensor


def obstacle(request: Request) -> str | None:
    """Return why the package cannot serve a request, or None."""
    if request.device != "cuda":
        return f"it runs on GPUs, and the tensors are on {request.device}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, and this is {str(request.dtype).removeprefix('torch.')}"
    capability = request.architecture.removeprefix("sm")
    if capability.isdigit() and int(capability) < int(OLDEST_GPU[2:]):
        return f"it needs {OLDEST_GPU} or newer, and this GPU is {request.architecture}"
    if request.head_width > 256 or request.head_width % 8:
        return (
            f"it takes heads up to 256 wide, in steps of 8, and these are {request.head_width} wide"
        )
    if request.mask == "block_sparse":
        return "it has no block-sparse masks"
    if "segments" in request.extras:
        return "it takes packed documents as cu_seqlens, not as segment ids or a dilation"
    if "empty_rows" in request.extras:
        return "its log-sum-exp is wrong for queries that see no key"
    if "lse" in request.extras and request.needs_grad:
        return "its log-sum-exp (which sinks need too) has no gradient"
    if request.compiling and request.mask == "packed":
        return "inside torch.compile the lengths of documents cannot be read"
    return missing()


@constant
def missing() -> str | None:
    """Return why the package cannot be used here and what to type, or None where it can."""
    oldest = ".".join(str(number) for number in OLDEST)
    remedy = f"type  pip install 'flash-attn>={oldest}' --no-build-isolation"
    try:
        if find_spec("flash_attn") is None:
            return f"the package is not installed; {remedy}"
    except ValueError:
        # A module that was put in place by hand has no spec; it is there all the same.
        pass
    try:
        version = str(import_module("flash_attn").__version__)
    except (ImportError, OSError) as error:
        return f"the package cannot be imported ({error}); {remedy}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"the package is {version}; {remedy}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; the latter has no gradient. See `reference`."""
    settings = settings_of(scoring, q.shape[2], k.shape[2])
    inputs = [each.transpose(1, 2) for each in (q, k, v)]
    if scoring.first is None:
        out, lse = call("flash_attn_func", inputs, settings)
    else:
        out, lse = packed(inputs, scoring, settings)
    return first_order_only(out.transpose(1, 2), "flash_attn"), lse.detach()


def settings_of(scoring: Scoring, queries: int, keys: int) -> dict[str, Any]:
    """Return causal order, window and score changes as the package spells them."""
    left, right = (-1 if side >= max(queries, keys) else side for side in scoring[1:3])
    return {
        "softmax_scale": scoring.scale,
        "causal": right == 0,
        "window_size": (left, right),
        "softcap": scoring.softcap,
        "alibi_slopes": scoring.slopes,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_attn_probs": True,
    }


def packed(
    inputs: list[Tensor], scoring: Scoring, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Call the package for documents that follow each other, all rows of the batch as one."""
    batch, length, heads, width = inputs[0].shape
    assert scoring.first is not None
    starts, longest = made_once(scoring.first, "flash_attn", lambda: boundaries(scoring))
    flat = [each.reshape(batch * length, -1, width) for each in inputs]
    lengths = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    out, lse = call("flash_attn_varlen_func", flat, {**lengths, **settings})
    out = out.reshape(batch, length, heads, width)
    return out, lse.reshape(heads, batch, length).transpose(0, 1)


def boundaries(scoring: Scoring) -> tuple[Tensor, int]:
    """Return where documents begin, counted over all rows of the batch, and the longest's length.

    Queries and keys share their documents here, so a query that sees no key before its own begins
    one. (With windows that look forward only, every query is such a one, and ends tell instead.)
    """
    assert scoring.first is not None and scoring.last is not None
    batch, length = scoring.first.shape
    places = torch.arange(length, device=scoring.first.device)
    if scoring.left or not scoring.right:
        begins = scoring.first == places
    else:
        begins = (scoring.last == places + 1).roll(1, 1)
    begins = begins.index_fill(1, places[:1], True).flatten()
    starts = begins.nonzero().squeeze(1)
    starts = torch.cat([starts, starts.new_tensor([batch * length])]).int()
    return starts, int(starts.diff().max())


def call(name: str, inputs: list[Tensor], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Call a function of the package for output and log-sum-exp."""
    out, lse, _ = getattr(import_module("flash_attn"), name)(*inputs, **settings)
    return out, lse
