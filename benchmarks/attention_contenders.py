"""Who computes attention in `benchmarks/attention.py`, on which shapes, and what is timed.

FLOPs are useful ones: the same number for every contender, whatever it computes besides. Forward
has 4 B H T S K of them (half where causal): two products of all queries with all keys. Backward
counts as 2.5 times that, five products, as everyone counts it; double backward as 9 times, the 18
products of the shortest deterministic schedule in tiles. What ours really computes differs: on a
GPU 7 in backward, to need no atomics, and in 16 bits 20 in double backward; on a CPU, where a slice
meets all keys at once, 5 and 12.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from interlace.kernels import attention

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], object]
Pass = Literal["forward", "backward", "double backward"]

PRODUCTS: dict[Pass, int] = {"forward": 2, "backward": 5, "double backward": 18}
"""Pass to the products of all queries with all keys that count as useful."""

PASSES: tuple[Pass, ...] = ("forward", "backward", "double backward")
OURS, FLASH, MATH, CUDNN = "interlace", "flash", "math", "cudnn"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem: self-attention over a batch of equal sequences.

    Attributes:
        tokens: Of all sequences together.
        length: Of one.
        hidden: Heads times their width.
        width: Of a head.
        causal: Whether queries see no later key.
    """

    tokens: int
    length: int
    hidden: int
    width: int
    causal: bool

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens // self.length

    @property
    def heads(self) -> int:
        """H."""
        return self.hidden // self.width

    @property
    def mask(self) -> str:
        """As the table says it."""
        return "causal" if self.causal else "full"

    def flops(self, which: Pass) -> float:
        """Return the useful FLOPs of a pass; see the head of this file."""
        product = 2.0 * self.tokens * self.length * self.hidden
        return PRODUCTS[which] * product / (2 if self.causal else 1)


@dataclass(frozen=True)
class Inputs:
    """What all contenders of one shape share.

    Attributes:
        leaves: q, k and v, to be differentiated.
        cotangent: Of the output.
        along: Cotangents of the three gradients.
    """

    leaves: tuple[Tensor, Tensor, Tensor]
    cotangent: Tensor
    along: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: For the table.
        orders: How often its result can be differentiated, as far as this benchmark asks.
        build: Returns the function for a shape; raises where it cannot.
    """

    name: str
    orders: Literal[1, 2]
    build: Callable[[Shape], Attend]

    def can(self, which: Pass) -> bool:
        """Return whether it claims to have a pass."""
        return which != "double backward" or self.orders == 2


def make_inputs(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    """Return tensors of a shape."""
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.heads, shape.length, shape.width

    def normal() -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    leaves = normal().requires_grad_(), normal().requires_grad_(), normal().requires_grad_()
    return Inputs(leaves, normal().requires_grad_(), (normal(), normal(), normal()))


def prepare(which: Pass, attend: Attend, inputs: Inputs) -> Step:
    """Do what comes before a pass, and return the pass; it can be repeated."""
    leaves, cotangent = inputs.leaves, inputs.cotangent
    if which == "forward":
        return lambda: attend(*leaves)
    out = attend(*leaves)
    if which == "backward":
        fixed = cotangent.detach()
        return lambda: torch.autograd.grad(out, leaves, fixed, retain_graph=True)
    firsts = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    wanted = (*leaves, cotangent)
    return lambda: torch.autograd.grad(firsts, wanted, inputs.along, retain_graph=True)


def contenders(device: str) -> list[Contender]:
    """Return everyone who is asked on a device, ours first."""
    ours = "triton" if device == "cuda" else "chunked"
    found = [
        Contender(OURS, 2, lambda shape: build_ours(shape, ours, 2)),
        Contender(FLASH, 1, lambda shape: build_sdpa(shape, SDPBackend.FLASH_ATTENTION)),
        Contender(MATH, 2, lambda shape: build_sdpa(shape, SDPBackend.MATH)),
    ]
    if device == "cuda":
        found += [
            Contender(CUDNN, 1, lambda shape: build_sdpa(shape, SDPBackend.CUDNN_ATTENTION)),
            Contender("flex", 1, build_flex),
            Contender("flash_attn", 1, build_flash_attn),
        ]
    return found


def build_ours(shape: Shape, backend: str, order: int) -> Attend:
    """Return the project's one call, on one back end."""
    return lambda q, k, v: attention(q, k, v, causal=shape.causal, order=order, backend=backend)


def build_sdpa(shape: Shape, backend: SDPBackend) -> Attend:
    """Return torch's call, on one back end."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    return run


def build_flex(shape: Shape) -> Attend:
    """Return FlexAttention, compiled for the shape."""
    from torch.nn.attention.flex_attention import (
        BlockMask,
        create_block_mask,
        flex_attention,
    )

    # Compiled code that gives its buffers away cannot run backward twice, as timing must.
    importlib.import_module("torch._functorch.config").__setattr__("donated_buffer", False)
    torch.compiler.reset()
    mask: BlockMask | None = None
    if shape.causal:
        length = shape.length
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mask = create_block_mask(not_later, None, None, length, length, device=device)
    call: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: call(q, k, v, block_mask=mask)


def not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Say which pairs are seen in causal order, as FlexAttention asks."""
    return query >= key


def build_flash_attn(shape: Shape) -> Attend:
    """Return the flash-attn package's call."""
    call: Any = importlib.import_module("flash_attn").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = (x.transpose(1, 2) for x in (q, k, v))
        return call(*moved, causal=shape.causal).transpose(1, 2)

    return run
