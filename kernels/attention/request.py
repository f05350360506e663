"""What a call of attention is, to those who must choose a back end for it."""

from dataclasses import dataclass
from typing import Literal

import torch

from interlace.kernels.attention.options import Options

Mask = Literal["none", "causal", "window", "packed", "block_sparse"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides which back end can serve a call, and which is fastest.

    Attributes:
        device: Type of the device: `cpu`, `cuda`, ...
        architecture: `cpu`, or a GPU's compute capability as in `sm90`.
        dtype: Of queries, keys and values.
        batch: B.
        heads: H, query heads.
        groups: G, key heads.
        queries: T.
        keys: S.
        head_width: K.
        mask: The most general kind of mask that is needed.
        causal: Whether keys after the aligned one are hidden, whatever the mask hides besides.
        extras: What else there is: `softcap`, `alibi`, `lse` (asked for, or needed by sinks),
            `empty_rows` (some queries may see no key), `segments` (ids decide pair by pair),
            `small_blocks` (a block mask whose blocks are no multiples of 16).
        order: How often the result will be differentiated.
        needs_grad: Whether it will be differentiated at all.
        deterministic: Whether equal inputs must give equal bits.
        compiling: Whether a compiler is tracing the call.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    head_width: int
    mask: Mask
    causal: bool
    extras: frozenset[str]
    order: int
    needs_grad: bool
    deterministic: bool
    compiling: bool = False

    @property
    def whole_mask(self) -> bool:
        """Whether a kernel that knows only causal order of equal lengths needs all pairs' mask."""
        simple = self.mask == "none" or (self.mask == "causal" and self.queries == self.keys)
        return not simple or "alibi" in self.extras


def request_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, order: int
) -> Request:
    """Return what a call with these tensors and options is."""
    inputs = (q, k, v) if options.sinks is None else (q, k, v, options.sinks)
    pairs = isinstance(options.segment_ids, tuple) or isinstance(options.cu_seqlens, tuple)
    mask = mask_of(options, q.shape[2], k.shape[2])
    extras = {
        "softcap": options.softcap is not None,
        "alibi": options.alibi_slopes is not None,
        "lse": options.return_lse or options.sinks is not None,
        "empty_rows": pairs
        or mask == "block_sparse"
        or (mask != "none" and q.shape[2] > k.shape[2]),
        "segments": options.segment_ids is not None or options.dilation > 1,
        "small_blocks": options.block_mask is not None
        and any(side % 16 for side in options.block_mask.BLOCK_SIZE),
    }
    return Request(
        device=q.device.type,
        architecture=architecture(q.device),
        dtype=q.dtype,
        batch=q.shape[0],
        heads=q.shape[1],
        groups=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        head_width=q.shape[3],
        mask=mask,
        causal=options.is_causal,
        extras=frozenset(name for name, asked in extras.items() if asked),
        order=order,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        compiling=torch.compiler.is_compiling(),
    )


def mask_of(options: Options, queries: int, keys: int) -> Mask:
    """Return the most general kind of mask that options need."""
    if options.block_mask is not None:
        return "block_sparse"
    packed = options.segment_ids is not None or options.cu_seqlens is not None
    if packed or options.dilation > 1:
        return "packed"
    if options.window is not None:
        return "window"
    # A single query is the last position, which sees everything.
    return "causal" if options.is_causal and not (queries == 1 and keys >= 1) else "none"


def architecture(device: torch.device) -> str:
    """Return the name under which a device's measurements are kept: `cpu`, `sm90`, ..."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
