"""State-space duality beside others and beside attention, forward and backward, by length.

On a GPU: our Triton kernels, `mamba-ssm` and `fla` where they can be imported, and torch's fused
attention of the same width, in bf16. On a CPU: chunks in torch beside the plain recurrence and
torch's flash attention for CPUs, in fp32. Rounds of all alternate in one process; medians count,
and ratios are medians of the ratios of a round. FLOP/s count the products of the algorithm at our
chunk (causal tiles only, backward as 2.5 times forward), and for attention 4 T^2 / 2 times the
width; the same count for every scan, so that rates compare. Memory is the peak above the inputs.

    python benchmarks/ssd.py [--lengths 1024 2048 ...] [--rounds 5] [--save]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from results import Row, save, table
from torch.nn import functional

from interlace.kernels import ssd

OURS_ON_CPU, OURS_ON_GPU = "interlace, chunked", "interlace, triton"
ATTENTION = "attention (torch's SDPA, causal)"
RECURRENCE = "recurrence (plain twin)"

LONGEST_RECURRENCE, RECURRENCE_ROUNDS = 1024, 2
"""Positions and rounds beyond which the recurrence would take the benchmark's whole time."""

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer; attention has as many heads of the same width."""

    batch: int
    length: int
    heads: int
    width: int = 64
    states: int = 128
    chunk: int = 256

    def scan_flops(self) -> float:
        """Forward products: half a chunk of scores and weights, states written and read."""
        inside = self.chunk * (self.states / self.heads + self.width)
        return self.batch * self.length * self.heads * (inside + 4 * self.states * self.width)

    def attention_flops(self) -> float:
        """Forward products of causal attention."""
        return 2 * self.batch * self.heads * self.length**2 * self.width


def inputs(shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    """Return inputs of the scan, and q, k, v, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = (shape.batch, shape.length)

    def leaf(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        made = torch.randn(sizes, generator=generator)
        return made.to(device, dtype).requires_grad_()

    steps = functional.softplus(torch.randn(*positions, shape.heads, generator=generator) - 2)
    rates = -torch.linspace(1, 16, shape.heads)
    attended = (shape.batch, shape.heads, shape.length, shape.width)
    return {
        "x": leaf(*positions, shape.heads, shape.width),
        "dt": steps.to(device).requires_grad_(),
        "A": rates.to(device).requires_grad_(),
        "B": leaf(*positions, 1, shape.states),
        "C": leaf(*positions, 1, shape.states),
        "D": leaf(shape.heads, dtype=torch.float32),
        "q": leaf(*attended),
        "k": leaf(*attended),
        "v": leaf(*attended),
    }


def of_mamba(t: Mapping[str, torch.Tensor], chunk: int) -> Call:
    """mamba-ssm's own Triton kernels."""
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    scan: Any = mamba_chunk_scan_combined
    return lambda: scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk, D=t["D"])


def of_fla(t: Mapping[str, torch.Tensor]) -> Call:
    """flash-linear-attention's simple_gla: the same recurrence, without D."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    scan: Any = chunk_simple_gla
    heads = t["x"].shape[2]

    def call() -> torch.Tensor:
        # It knows no shared keys and no steps; expanding and scaling are its part of the task.
        reads, writes = (t[name].expand(-1, -1, heads, -1).contiguous() for name in ("C", "B"))
        scaled = (t["x"] * t["dt"].unsqueeze(-1)).to(t["x"].dtype)
        return scan(reads, writes, scaled, g=t["dt"] * t["A"], scale=1.0)[0]

    return call


def contenders(shape: Shape, device: torch.device) -> tuple[dict[str, Call], list[str]]:
    """Return who can run at this shape, and why others cannot."""
    t = inputs(shape, device)
    x, dt, A, B, C, D = (t[name] for name in ("x", "dt", "A", "B", "C", "D"))
    found: dict[str, Call] = {}
    notes: list[str] = []
    if device.type == "cpu":
        found[OURS_ON_CPU] = lambda: ssd(x, dt, A, B, C, D=D)
        if shape.length <= LONGEST_RECURRENCE:
            found[RECURRENCE] = lambda: ssd(x, dt, A, B, C, D=D, backend="reference")
        else:
            notes.append(f"{RECURRENCE}: left out beyond {LONGEST_RECURRENCE} positions, for time")
    else:
        found[OURS_ON_GPU] = lambda: ssd(x, dt, A, B, C, D=D, backend="triton")
    others: dict[str, Callable[[], Call]] = {
        "mamba-ssm": lambda: of_mamba(t, shape.chunk),
        "fla": lambda: of_fla(t),
    }
    for name, build in others.items():
        if device.type == "cpu":
            notes.append(f"{name}: its kernels need a GPU")
            continue
        try:
            found[name] = build()
            found[name]()
        except Exception as error:
            found.pop(name, None)
            notes.append(f"{name} did not run: {type(error).__name__}: {error}")
    found[ATTENTION] = lambda: functional.scaled_dot_product_attention(
        t["q"], t["k"], t["v"], is_causal=True
    )
    return found, notes


@dataclass(kw_only=True)
class Times:
    """Seconds of every round, and the largest memory, of one contender."""

    forward: list[float]
    backward: list[float]
    peak_bytes: int = 0


def run(call: Call, times: Times, device: torch.device) -> None:
    """Time one forward and one backward pass."""
    on_gpu = device.type == "cuda"
    held = 0
    if on_gpu:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    moments: list[float] = []

    def mark() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    mark()
    y = call()
    mark()
    upstream = torch.ones_like(y)
    mark()
    y.backward(upstream)
    mark()
    times.forward.append(moments[1] - moments[0])
    times.backward.append(moments[3] - moments[2])
    if on_gpu:
        times.peak_bytes = max(times.peak_bytes, torch.cuda.max_memory_allocated() - held)


def measure(shape: Shape, device: torch.device, rounds: int) -> tuple[list[Row], list[str]]:
    """Time everyone at one shape in turn; return rows and notes."""
    running, notes = contenders(shape, device)
    times = {name: Times(forward=[], backward=[]) for name in running}
    for number in range(rounds + 1):
        for name, call in running.items():
            if name != RECURRENCE or number <= RECURRENCE_ROUNDS:
                run(call, times[name], device)
    ours = times[OURS_ON_CPU if device.type == "cpu" else OURS_ON_GPU]
    rows: list[Row] = []
    for name, taken in times.items():
        # The first round compiles and warms up.
        forward, backward = taken.forward[1:], taken.backward[1:]
        both = [a + b for a, b in zip(forward, backward, strict=True)]
        own = [a + b for a, b in zip(ours.forward[1:], ours.backward[1:], strict=True)]
        flops = shape.attention_flops() if name == ATTENTION else shape.scan_flops()
        row: dict[str, object] = {
            "length": shape.length,
            "batch": shape.batch,
            "contender": name,
            "forward ms": statistics.median(forward) * 1e3,
            "backward ms": statistics.median(backward) * 1e3,
            "forward TFLOP/s": flops / statistics.median(forward) / 1e12,
            "backward TFLOP/s": 2.5 * flops / statistics.median(backward) / 1e12,
            "tokens/s": shape.batch * shape.length / statistics.median(both),
            "times as long as ours": statistics.median(
                # The recurrence has fewer rounds.
                b / o
                for b, o in zip(both, own, strict=False)
            ),
        }
        if device.type == "cuda":
            row["peak MiB"] = taken.peak_bytes / 2**20
        rows.append(row)
    return rows, notes


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    lengths = [1024, 2048, 4096, 8192, 16384, 65536] if on_gpu else [1024, 2048, 4096, 8192]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ssd-*")
    arguments = parser.parse_args()
    rows: list[Row] = []
    notes = [f"load of the machine before: {os.getloadavg()[0]:.1f}"]
    for length in arguments.lengths:
        if on_gpu:
            # As many tokens in all as 16 thousand, at least one row.
            shape = Shape(batch=max(1, 16384 // length), length=length, heads=32)
        else:
            shape = Shape(batch=1, length=length, heads=4, states=64, chunk=64)
        found, why = measure(shape, device, arguments.rounds)
        rows += found
        notes += [note for note in why if note not in notes]
        print(table(found), flush=True)
    sizes = "32 heads of 64, 128 states, bf16" if on_gpu else "4 heads of 64, 64 states, fp32"
    notes.append(f"{sizes}; one group; median of {arguments.rounds} rounds")
    notes.append(f"threads: {torch.get_num_threads()}")
    print("\n".join(notes))
    if arguments.save:
        save(
            "ssd-gpu" if on_gpu else "ssd-cpu", "State-space duality beside attention", rows, notes
        )


if __name__ == "__main__":
    main()
