"""The back ends of attention: what each can do, and how often its result can be differentiated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from interlace.kernels.attention import flash_attn, flex, reference, sdpa
from interlace.kernels.attention.differentiation import attend
from interlace.kernels.attention.first_order import first_order_only
from interlace.kernels.attention.measurements import constant
from interlace.kernels.attention.request import Request
from interlace.kernels.attention.scoring import Scoring
from interlace.kernels.triton_language import why_no_triton

Order = Literal[1, 2, "any"]
Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Scoring], tuple[torch.Tensor, torch.Tensor | None]
]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: As users write it.
        what: What it is, in a few words.
        order: How often its result can be differentiated.
        obstacle: Says why it cannot serve a request, or None.
        run: Computes the output, and the log-sum-exp where it has one.
    """

    name: str
    what: str
    order: Order
    obstacle: Callable[[Request], str | None]
    run: Run

    def why_not(self, request: Request) -> str | None:
        """Return why the back end cannot serve a request, or None."""
        if self.order != "any" and request.order > self.order:
            return (
                f"it has derivatives up to order {self.order}, and order {request.order} is asked"
            )
        return self.obstacle(request)


def nothing(request: Request) -> None:
    """No request is an obstacle."""


def triton_obstacle(request: Request) -> str | None:
    """Return why the Triton kernels cannot serve a request, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if request.head_width > 256:
        return f"its tiles hold heads up to 256 wide, these are {request.head_width}"
    if "small_blocks" in request.extras:
        return "its tiles are multiples of 16, and the blocks of the block mask are not"
    interpreted = triton_is_interpreted()
    if request.device == "cuda" and request.dtype is torch.float64 and not interpreted:
        return "its GPU kernels take fp32, fp16 and bf16"
    if request.device != "cuda" and not interpreted:
        return (
            f"it needs a GPU, and the tensors are on {request.device} (TRITON_INTERPRET=1, set "
            "before Python starts, runs it in Triton's slow interpreter, for tests)"
        )
    return None


@constant
def triton_missing() -> str | None:
    """Return why there is no Triton, or None; compilers ask once."""
    return why_no_triton()


@constant
def triton_is_interpreted() -> bool:
    """Return whether Triton kernels run in the interpreter; Triton must be there."""
    from interlace.kernels.attention.triton.tuning import INTERPRETED

    return INTERPRETED


def run_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, None]:
    """Call torch's kernels, guarded."""
    return first_order_only(sdpa.attention(q, k, v, scoring)[0], "sdpa"), None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="reference",
            what="the formula in plain torch, quadratic memory",
            order="any",
            obstacle=nothing,
            run=reference.attention,
        ),
        Backend(
            name="chunked",
            what="slices of queries in plain torch, linear memory",
            order="any",
            obstacle=nothing,
            run=partial(attend, backend="chunked"),
        ),
        Backend(
            name="sdpa",
            what="torch's scaled_dot_product_attention",
            order=1,
            obstacle=sdpa.obstacle,
            run=run_sdpa,
        ),
        Backend(
            name="flex",
            what="torch's FlexAttention, which skips hidden blocks",
            order=1,
            obstacle=flex.obstacle,
            run=flex.attention,
        ),
        Backend(
            name="flash_attn",
            what="Dao-AILab's flash-attn package",
            order=1,
            obstacle=flash_attn.obstacle,
            run=flash_attn.attention,
        ),
        Backend(
            name="triton",
            what="our tiled GPU kernels, linear memory, deterministic",
            order=2,
            obstacle=triton_obstacle,
            run=partial(attend, backend="triton"),
        ),
    )
}
"""Name to back end."""
