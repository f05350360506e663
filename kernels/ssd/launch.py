"""Runs the Triton kernels of state-space duality in order, on the current stream.

Sizes of tiles come from a small table, not from trials: nothing is compiled twice, results do not
depend on what was measured, and without a GPU (in Triton's interpreter) nothing has to be timed.
"""

# Calls of Triton kernels are opaque to pyright.
# pyright: basic

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from interlace.kernels.ssd import backward_kernels as backward
from interlace.kernels.ssd import forward_kernels as forward
from interlace.kernels.ssd.chunks import ChunkTable, chunk_table

LEAST = 16
"""Smallest side of a matrix that tl.dot takes."""

PROGRAMS = 512
"""Programs that keep a large GPU busy; heads of a group are split until there are as many."""

CARRIED = 1024
"""Elements of a state that one program carries from chunk to chunk."""

PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work on a chunk is cut."""

    rows: int
    """Positions of a tile."""

    width: int
    """Columns of a head that are worked on together."""

    warps: int = 4
    stages: int = 2


def tiles_for(dtype: torch.dtype, chunk: int, width: int, states: int) -> Tiles:
    """Return the tiles for a dtype and shape: small enough for registers and shared memory."""
    rows = 32 if dtype is torch.float32 else 64
    columns = 32 if states > 128 or dtype is torch.float32 else 64
    return Tiles(rows=min(rows, chunk), width=min(columns, rounded(width)))


def rounded(size: int) -> int:
    """Return the smallest side of a tile that holds `size`."""
    return max(LEAST, triton.next_power_of_2(size))


def launch(kernel: Any, grid: tuple[int, ...], *values: object, **options: object) -> None:
    """Start a kernel over a grid of programs."""
    kernel[grid](*values, **options)


def by_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a tensor (B, T, ...) whose rows are evenly spaced and whole, and their distance.

    Slices of a wider tensor stay what they are; anything else is copied.
    """
    spaced = tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    whole = tensor[0, 0].is_contiguous()
    if not (spaced and whole and tensor.stride(1) >= tensor[0, 0].numel()):
        tensor = tensor.contiguous()
    return tensor, tensor.stride(1)


class Problem:
    """Inputs, sizes and workspaces of one call."""

    def __init__(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        chunk: int,
    ) -> None:
        if chunk < LEAST or chunk & (chunk - 1):
            raise ValueError(
                f"ssd: chunk={chunk}; the Triton kernels take a power of two from {LEAST}"
            )
        self.batch, length, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.rows, self.shared = self.batch * length, self.heads // self.groups
        # A chunk need not be longer than the sequence.
        self.chunk = min(chunk, rounded(length))
        self.table: ChunkTable = chunk_table(self.batch, length, self.chunk, segment_ids, x.device)
        self.chunks = self.table.start.shape[0]
        self.x, self.x_stride = by_rows(x)
        self.dt, self.dt_stride = by_rows(dt)
        self.B, self.b_stride = by_rows(B)
        self.C, self.c_stride = by_rows(C)
        self.A = A.float().contiguous()
        # An absent tensor is never touched; any pointer stands in for it.
        self.has_skip = D is not None
        self.D = self.A if D is None else D.float().contiguous()
        self.tiles = tiles_for(x.dtype, self.chunk, self.width, self.states)
        self.tile_count = self.chunk // self.tiles.rows
        self.product = self.multiplied()

    def multiplied(self) -> dict[str, Any]:
        """Return in what type tiles are multiplied, and how it is launched."""
        dtype = self.x.dtype
        # The interpreter multiplies the bit patterns of bfloat16.
        wide = os.environ.get("TRITON_INTERPRET") == "1"
        return {
            "product": tl.float32 if wide else PRODUCTS[dtype],
            "precision": "tf32x3" if dtype is torch.float32 else "ieee",
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    def float32(self, *shape: int) -> torch.Tensor:
        """Return an empty workspace."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    @property
    def chunk_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First row and number of rows of every chunk."""
        return self.table.start, self.table.length

    @property
    def splits(self) -> tuple[int, int]:
        """In how many parts the heads of a group are worked on, and heads of each."""
        wanted = triton.cdiv(PROGRAMS, self.chunks * self.tile_count * self.groups)
        heads = triton.cdiv(self.shared, min(self.shared, wanted))
        return triton.cdiv(self.shared, heads), heads

    @property
    def width_tiles(self) -> int:
        """Tiles across a head."""
        return triton.cdiv(self.width, self.tiles.width)

    def running_sums(self) -> torch.Tensor:
        """Return running sums of the log decays, and what fp32 lacks of them, (2, H, rows)."""
        running = self.float32(2, self.heads, self.rows)
        launch(
            forward.running_sums,
            (self.chunks, self.heads),
            self.dt,
            self.A,
            *self.chunk_rows,
            running,
            self.dt_stride,
            self.rows,
            self.heads,
            Q=self.chunk,
        )
        return running

    def scores(self) -> torch.Tensor:
        """Return C B^T inside chunks (M, G, Q, Q); tiles above the diagonal are not written."""
        scores = self.float32(self.chunks, self.groups, self.chunk, self.chunk)
        launch(
            forward.score_tiles, (self.chunks * self.tile_count**2, self.groups),
            self.B, self.C, *self.chunk_rows, scores,
            self.b_stride, self.c_stride, self.groups, self.states,
            Q=self.chunk, tile=self.tiles.rows, states=rounded(self.states), **self.product,
        )  # fmt: skip
        return scores

    def state_sums(self, running: torch.Tensor, dy: torch.Tensor | None) -> torch.Tensor:
        """Return what chunks add to the state, or `dy` to its gradient, (M, H, P, N)."""
        out = self.float32(self.chunks, self.heads, self.width, self.states)
        values, value_stride = (self.x, self.x_stride) if dy is None else by_rows(dy)
        keys, key_stride = (self.B, self.b_stride) if dy is None else (self.C, self.c_stride)
        launch(
            forward.state_sums, (self.chunks, self.heads, self.width_tiles),
            values, keys, self.dt, running, *self.chunk_rows, out,
            value_stride, key_stride, self.dt_stride,
            self.rows, self.heads, self.shared, self.width, self.states,
            to_end=dy is None, tile=self.tiles.rows, wide=self.tiles.width,
            states=rounded(self.states), **self.product,
        )  # fmt: skip
        return out

    def carry(
        self,
        sums: torch.Tensor,
        running: torch.Tensor,
        source: torch.Tensor | None,
        backwards: bool,
    ) -> torch.Tensor:
        """Turn sums into the states that enter chunks, in place; return what comes out at the end
        (B, H, P, N)."""
        target = self.float32(self.batch, self.heads, self.width, self.states)
        table, size = self.table, self.width * self.states
        entry, way_out = (table.ends, table.begins) if backwards else (table.begins, table.ends)
        grid = (table.first_chunk.shape[0], self.heads, triton.cdiv(size, CARRIED))
        launch(
            forward.carry_states, grid,
            sums, running, *self.chunk_rows, table.first_chunk, table.chunk_count,
            sums if source is None else source.float().contiguous(), entry, target, way_out,
            self.rows, self.heads, size,
            has_source=source is not None, backwards=backwards, block=CARRIED,
        )  # fmt: skip
        return target

    def recompute(self, initial_states: torch.Tensor | None, dy: torch.Tensor) -> "Recomputed":
        """Compute once more what the forward pass did not keep."""
        running = self.running_sums()
        entering = self.state_sums(running, None)
        self.carry(entering, running, initial_states, backwards=False)
        return Recomputed(
            running=running,
            scores=self.scores(),
            entering=entering,
            leaving=self.state_sums(running, dy),
        )


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """What the backward kernels share."""

    running: torch.Tensor
    """Running sums of log decays inside chunks (2, H, rows)."""

    scores: torch.Tensor
    """C B^T inside chunks (M, G, Q, Q)."""

    entering: torch.Tensor
    """States that enter chunks (M, H, P, N)."""

    leaving: torch.Tensor
    """Gradients of the states that leave chunks (M, H, P, N), once they are carried."""


def run_forward(
    problem: Problem, initial_states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (B, T, H, P) in the dtype of x and the final states (B, H, P, N) in fp32."""
    p = problem
    running, scores = p.running_sums(), p.scores()
    states = p.state_sums(running, None)
    final = p.carry(states, running, initial_states, backwards=False)
    y = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    launch(
            forward.outputs, (p.chunks * p.tile_count, p.heads, p.width_tiles),
        p.x, p.dt, p.C, p.D, running, scores, states, *p.chunk_rows, y,
        p.x_stride, p.dt_stride, p.c_stride, p.rows, p.heads, p.shared, p.width, p.states,
        has_skip=p.has_skip, Q=p.chunk, tile=p.tiles.rows, wide=p.tiles.width,
        all_states=rounded(p.states), **p.product,
    )  # fmt: skip
    return y, final


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of the inputs, in fp32 but for x."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    initial_states: torch.Tensor


def run_backward(
    problem: Problem,
    initial_states: torch.Tensor | None,
    dy: torch.Tensor,
    final_gradient: torch.Tensor,
) -> Gradients:
    """Return the gradients for those of y and of the final states."""
    p, dy = problem, dy.contiguous()
    kept = p.recompute(initial_states, dy)
    initial = p.carry(kept.leaving, kept.running, final_gradient, backwards=True)
    dx, d_skip = gradient_of_x(p, dy, kept)
    d_scores, rows, columns = gradient_of_scores(p, dy, kept)
    d_writes, writing = gradient_of_keys(p, dy, kept, d_scores, of_writes=True)
    d_reads, reading = gradient_of_keys(p, dy, kept, d_scores, of_writes=False)
    d_dt, rate_parts = p.float32(*p.dt.shape), p.float32(p.chunks, p.heads)
    launch(
        backward.step_gradients, (p.chunks, p.heads),
        p.dt, p.A, kept.running, kept.entering, kept.leaving, rows, columns, reading, writing,
        *p.chunk_rows, d_dt, rate_parts, p.dt_stride, p.rows, p.heads, p.width, p.states,
        Q=p.chunk, tile=p.tiles.rows, wide=p.tiles.width, all_states=rounded(p.states),
    )  # fmt: skip
    return Gradients(
        x=dx,
        dt=d_dt,
        A=rate_parts.sum(0),
        B=d_writes,
        C=d_reads,
        D=d_skip,
        initial_states=initial,
    )


def gradient_of_x(
    p: Problem, dy: torch.Tensor, kept: Recomputed
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x, in its dtype, and of D (H, P)."""
    dx = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    # Tiles behind the end of a chunk write no part.
    count = p.chunks * p.tile_count
    parts = dy.new_zeros((count, p.heads, p.width) if p.has_skip else (1,), dtype=torch.float32)
    launch(
        backward.input_gradients, (count, p.heads, p.width_tiles),
        p.x, p.dt, p.B, p.D, dy, kept.running, kept.scores, kept.leaving, *p.chunk_rows, dx, parts,
        p.x_stride, p.dt_stride, p.b_stride, p.rows, p.heads, p.shared, p.width, p.states,
        has_skip=p.has_skip, Q=p.chunk, tile=p.tiles.rows, wide=p.tiles.width,
        all_states=rounded(p.states), **p.product,
    )  # fmt: skip
    return dx, parts.sum(0) if p.has_skip else None


def with_warps(problem: Problem, warps: int) -> dict[str, Any]:
    """Return how tiles are multiplied, on more threads: for kernels that hold two sums at once."""
    return {**problem.product, "num_warps": warps}


def gradient_of_scores(
    p: Problem, dy: torch.Tensor, kept: Recomputed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of C B^T by split (splits, M, G, Q, Q), and the sums over rows and
    columns of tiles (tiles, H, rows).
    """
    splits, split_heads = p.splits
    rows, columns = (p.float32(p.tile_count, p.heads, p.rows) for _ in range(2))
    d_scores = p.float32(splits, p.chunks, p.groups, p.chunk, p.chunk)
    launch(
        backward.score_gradients, (p.chunks * p.tile_count**2, p.groups, splits),
        p.x, p.dt, dy, kept.running, kept.scores, *p.chunk_rows, d_scores, rows, columns,
        p.x_stride, p.dt_stride, p.rows, p.heads, p.shared, p.width, p.chunks, split_heads,
        Q=p.chunk, tile=p.tiles.rows, wide=p.tiles.width, **with_warps(p, 8),
    )  # fmt: skip
    return d_scores, rows, columns


def gradient_of_keys(
    p: Problem, dy: torch.Tensor, kept: Recomputed, d_scores: torch.Tensor, *, of_writes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of B or C (B, T, G, N), and what goes through the state per position
    (H, rows).
    """
    splits, split_heads = p.splits
    if of_writes:
        tensors, states = (p.x, p.B, p.C), kept.leaving
        strides = (p.x_stride, p.b_stride, p.c_stride)
    else:
        tensors, states = (dy, p.C, p.B), kept.entering
        strides = (p.heads * p.width, p.c_stride, p.b_stride)
    out, through = p.float32(splits, p.rows, p.groups, p.states), p.float32(p.heads, p.rows)
    launch(
        backward.key_gradients, (p.chunks * p.tile_count, p.groups, splits),
        *tensors, p.dt, kept.running, states, d_scores, *p.chunk_rows, out, through,
        *strides, p.dt_stride,
        p.rows, p.heads, p.shared, p.width, p.states, p.chunks, split_heads,
        of_writes=of_writes, Q=p.chunk, tile=p.tiles.rows, wide=p.tiles.width,
        all_states=rounded(p.states), **with_warps(p, 8),
    )  # fmt: skip
    return out.sum(0).view(p.B.shape), through
