"""Launching the tiled kernels: from tensors and a `Scoring` to grids and arguments."""

# Triton's launchers take arguments of any type.
# pyright: basic

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from interlace.kernels.attention.scoring import HIDDEN, Scoring, query_ranges
from interlace.kernels.attention.shared import made_once
from interlace.kernels.attention.triton.backward import (
    backward_columns_kernel,
    backward_rows_kernel,
)
from interlace.kernels.attention.triton.double_backward import (
    double_backward_columns_kernel,
    double_backward_rows_kernel,
    tangent_kernel,
)
from interlace.kernels.attention.triton.forward import forward_kernel
from interlace.kernels.attention.triton.tiles import LOG2E, Blocks, How, Seen, Sizes
from interlace.kernels.attention.triton.tuning import INTERPRETED, LONGEST, Tile, tile_for

Tensor = torch.Tensor
NOWHERE = Blocks(None, None, None, None, 0, 0, 0, 0, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; see `chunked.forward`."""
    call = Call(q, k, scoring)
    q, k, v = rows_together(q, k, v)
    out, lse = torch.empty_like(q), call.numbers()
    call.by_queries(forward_kernel, (q, k, v, out, lse), (q, k, v, out))
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; see `chunked.backward`."""
    call = Call(q, k, scoring)
    q, k, v, out, g = rows_together(q, k, v, out, grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta, lse = call.numbers(), lse.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call.by_queries(
        backward_rows_kernel,
        (q, k, v, out, lse, g, grad_lse, delta, grad_q),
        (q, k, v, out, g, grad_q),
    )
    call.by_keys(
        backward_columns_kernel,
        (q, k, v, lse, g, delta, grad_k, grad_v),
        (q, k, v, g, grad_k, grad_v),
    )
    return grad_q, grad_k, grad_v


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    along_q: Tensor,
    along_k: Tensor,
    along_v: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of output and log-sum-exp; see `chunked.tangent`."""
    call = Call(q, k, scoring)
    q, k, v, out, x, y, z = rows_together(q, k, v, out, along_q, along_k, along_v)
    along_out, along_lse = torch.empty_like(q), call.numbers()
    call.by_queries(
        tangent_kernel,
        (q, k, v, x, y, z, out, lse.contiguous(), along_out, along_lse),
        (q, k, v, x, y, z, out, along_out),
    )
    return along_out, along_lse


def double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_q: Tensor,
    along_q: Tensor,
    along_k: Tensor,
    along_v: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the gradients; see `chunked.double_backward`."""
    call = Call(q, k, scoring)
    q, k, v, out, g, grad_q = rows_together(q, k, v, out, grad_out, grad_q)
    x, y, z = rows_together(along_q, along_k, along_v)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse, delta, constant = lse.contiguous(), call.numbers(), call.numbers()
    along_out, along_lse = torch.empty_like(q), call.numbers()
    second_q, second_k, second_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if call.centred:
        call.by_queries(
            tangent_kernel,
            (q, k, v, x, y, z, out, lse, along_out, along_lse),
            (q, k, v, x, y, z, out, along_out),
        )
    inputs = q, k, v, x, y, z, out, lse, g, grad_lse, grad_q
    call.by_queries(
        double_backward_rows_kernel,
        (*inputs, delta, along_out, along_lse, constant, second_q),
        (q, k, v, x, y, z, out, g, grad_q, along_out, second_q),
    )
    call.by_keys(
        double_backward_columns_kernel,
        (q, k, v, x, y, z, lse, g, delta, along_lse, constant, second_k, second_v),
        (q, k, v, x, y, z, g, second_k, second_v),
    )
    return second_q, second_k, second_v, along_out, along_lse


class Call:
    """What all kernels of one computation are launched with.

    Attributes:
        centred: Whether double backward learns the row means in a pass of its own before.
    """

    def __init__(self, q: Tensor, k: Tensor, scoring: Scoring) -> None:
        self.q, self.k, self.scoring = q, k, scoring
        self.centred = q.element_size() == 2
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.sizes = Sizes(
            queries=q.shape[2],
            keys=k.shape[2],
            heads=q.shape[1],
            ratio=q.shape[1] // k.shape[1],
            scale=scoring.scale,
            softcap=scoring.softcap,
        )

    def numbers(self) -> Tensor:
        """Return room for one number per query."""
        return torch.empty(self.q.shape[:3], dtype=self.wide, device=self.q.device)

    def tile(self, kernel: Any) -> Tile:
        """Return the tile of a kernel; with a block-sparse mask, one that divides its blocks."""
        tile, pairs = tile_for(kernel.__name__, self.q), self.scoring.pairs
        if pairs is None:
            return tile
        rows, columns = math.gcd(tile.rows, pairs.shape[1]), math.gcd(tile.columns, pairs.shape[2])
        return replace(tile, rows=rows, columns=columns)

    def by_queries(
        self, kernel: Any, arguments: tuple[Any, ...], strided: tuple[Tensor, ...]
    ) -> None:
        """Run a kernel over tiles of queries of all query heads."""
        tile = self.tile(kernel)
        self.run(kernel, tile, tile.rows, self.q, arguments, strided, by_keys=False)

    def by_keys(self, kernel: Any, arguments: tuple[Any, ...], strided: tuple[Tensor, ...]) -> None:
        """Run a kernel over tiles of keys of all key heads."""
        tile = self.tile(kernel)
        self.run(kernel, tile, tile.columns, self.k, arguments, strided, by_keys=True)

    def run(
        self,
        kernel: Any,
        tile: Tile,
        length: int,
        own: Tensor,
        arguments: tuple[Any, ...],
        strided: tuple[Tensor, ...],
        *,
        by_keys: bool,
    ) -> None:
        """Launch one program per tile of `length` positions, row of the batch and head of `own`."""
        grid = triton.cdiv(own.shape[2], length), own.shape[0] * own.shape[1]
        strides = (x.stride()[:3] for x in strided)
        kinds, pairs, blocks = self.scoring.kinds, self.scoring.pairs, NOWHERE
        if kinds is not None:
            listed = partial(list_blocks, kinds.detach(), pairs, by_keys)
            blocks = made_once(kinds, ("lists", by_keys), listed)
        with torch.cuda.device_of(own):
            kernel[grid](
                *arguments,
                *strides,
                self.sizes,
                self.seen(by_keys),
                blocks,
                self.how(tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    def seen(self, by_keys: bool) -> Seen:
        """Return the pointers that say which pairs are seen."""
        scoring, above, below = self.scoring, None, None
        if by_keys and scoring.first is not None and scoring.last is not None:
            turned = partial(query_ranges, scoring.first, scoring.last, self.sizes.keys)
            above, below = made_once(scoring.first, ("turned", self.sizes.keys), turned)
        slopes = None if scoring.slopes is None else scoring.slopes * LOG2E.value
        return Seen(
            left=scoring.left,
            right=scoring.right,
            first=scoring.first,
            last=scoring.last,
            above=above,
            below=below,
            query_segments=scoring.query_segments,
            key_segments=scoring.key_segments,
            aligned=scoring.diagonal,
            slopes=slopes,
        )

    def how(self, tile: Tile) -> How:
        """Return what the kernels are compiled for."""
        pairs, width = self.scoring.pairs, self.q.shape[3]
        block_q, block_kv = (0, 0) if pairs is None else pairs.shape[1:]
        exact = torch.get_float32_matmul_precision() == "highest"
        fields = How(
            WIDTH=width,
            PADDED=max(16, triton.next_power_of_2(width)),
            WIDE=INTERPRETED and self.q.element_size() == 2,
            PRECISION="ieee" if exact else "tf32",
            SOFTCAP=self.scoring.softcap != 0.0,
            ALIBI=self.scoring.slopes is not None,
            SEGMENTS=self.scoring.query_segments is not None,
            SPARSE=pairs is not None,
            BLOCK_Q=block_q,
            BLOCK_KV=block_kv,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            CENTRED=self.centred,
        )
        return How(*(tl.constexpr(field) for field in fields))


def rows_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose rows lie together in memory, copying those that do not, and those whose
    rows are so far apart that places inside a tile would not fit 32 bits.
    """
    fits = 2**31 // LONGEST
    return tuple(
        x if x.stride(-1) == 1 and x.stride(-2) < fits else x.contiguous() for x in tensors
    )


def list_blocks(kinds: Tensor, pairs: Tensor | None, by_keys: bool) -> Blocks:
    """Return which blocks each block of one side sees, the hidden ones behind the others."""
    assert pairs is not None
    kinds = kinds.transpose(2, 3) if by_keys else kinds
    order = (kinds == HIDDEN).to(torch.uint8).argsort(dim=-1, stable=True)
    batches, heads, own, other = kinds.shape
    return Blocks(
        counts=(kinds != HIDDEN).sum(-1, dtype=torch.int32).contiguous(),
        lists=order.to(torch.int32).contiguous(),
        kinds=kinds.gather(-1, order).contiguous(),
        pairs=pairs.view(torch.uint8),
        own=own,
        other=other,
        batch_step=int(batches > 1),
        head_step=int(heads > 1),
        heads=heads,
    )
