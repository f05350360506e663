"""The back ends of attention: what each can do, how often it can be differentiated, how it is run."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from interlace.kernels.attention.differentiation import attend
from interlace.kernels.attention.options import Options
from interlace.kernels.attention.scoring import Scoring
from interlace.kernels.triton_language import why_no_triton

Order = Literal[1, 2, "any"]
Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What decides which back end can serve a call, and which is fastest.

    Attributes:
        device: Type of the device: `cpu`, `cuda`, ...
        architecture: `cpu`, or a GPU's compute capability as in `sm90`.
        dtype: Of queries, keys and values.
        head_width: K.
        heads: H, query heads.
        groups: G, key heads.
        queries: T.
        keys: S.
        mask: The widest kind of mask there is.
        extras: Whatever else was asked for: `softcap`, `alibi`, `lse` (also for sinks).
        order: How often the result will be differentiated.
        needs_grad: Whether it will be differentiated at all.
        deterministic: Whether equal inputs must give equal bits.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    head_width: int
    heads: int
    groups: int
    queries: int
    keys: int
    mask: Literal["none", "causal", "window", "packed", "block_sparse"]
    extras: frozenset[str]
    order: int
    needs_grad: bool
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: As users write it.
        order: How often its result can be differentiated.
        obstacle: Says why it cannot serve a request, or None.
        run: Returns the output, and the log-sum-exp where it has one.
    """

    name: str
    order: Order
    obstacle: Callable[[Request], str | None]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], Output]
