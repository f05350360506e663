"""Updates on the CPU: one pass of ours for every kind of state, against the separate passes of
others, and against a plain copy.

The task is that of offloading: a bfloat16 gradient comes in, fp32 master and moments are updated, a
bfloat16 weight goes out, gradients are scaled on the way. Ours does it in one pass. torch's fused
AdamW and DeepSpeedCPUAdam need fp32 gradients, so each gets a pass that widens (and scales) before
and one that rounds after. Rounds alternate in one process; medians count. Bytes are those of the
one-pass task (28 per parameter for AdamW) for everyone, so GB/s compare directly; the roof is what
a copy with as many threads reaches, its own bytes counted. Clipped SGD does the same task with half
of Adam's state, a quarter or none: its parameters per second count. The histogram is what a
quantile costs that thresholds come from.

    python benchmarks/cpu_update.py [--elements 100000000] [--rounds 7] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from results import Row, save, table

from interlace.kernels.update import (
    AdamW,
    CoordinateClip,
    Signum,
    Slab,
    Step,
    UpdateRule,
    clipped_sgd,
    magnitude_histogram,
    update,
)
from interlace.offload.cores import CpuPool
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Footprint

RULE = AdamW(lr=1e-3, weight_decay=0.1)
SCALE = 0.7
COPIED = "plain copy (the roof)"
OURS = "interlace AdamW, one pass"
RULES: dict[str, tuple[UpdateRule, torch.dtype]] = {
    OURS: (RULE, torch.float32),
    "interlace AdamW, clipped first moment": (CoordinateClip(RULE, 0.5), torch.float32),
    "interlace clipped SGD, fp32 momentum": (clipped_sgd(threshold=0.5), torch.float32),
    "interlace clipped SGD, bf16 momentum": (clipped_sgd(threshold=0.5), torch.bfloat16),
    "interlace clipped SGD, no momentum": (clipped_sgd(1e-3, 0.5, 0.0), torch.float32),
    "interlace Signum, fp32 momentum": (Signum(), torch.float32),
}
"""Rules of ours and the dtype of their moments; a gradient of the benchmark crosses 0.5 often."""

Contender = tuple[Callable[[int], object], int]
"""What to run in round n, and the bytes of its task per parameter."""


class State:
    """Gradient, master, moments and weight of one contender, touched by the pool's threads."""

    def __init__(
        self, host: HostSlabs, gradient: torch.Tensor, moments: int, dtype: torch.dtype
    ) -> None:
        elements = gradient.numel()
        self.gradient = gradient
        self.master = host.empty(elements, torch.float32)
        self.moments = tuple(host.empty(elements, dtype) for _ in range(moments))
        self.weight = host.empty(elements, torch.bfloat16)
        self.footprint = Footprint(weight=2, gradient=2, state=4 + moments * dtype.itemsize)


def ours(rule: UpdateRule, state: State, pool: CpuPool) -> Contender:
    """One pass on threads of our own."""
    slab = Slab(state.gradient, state.master, state.moments, state.weight)

    def run(number: int) -> None:
        step = Step(number, SCALE, rule.hyperparameters())
        pool.over_range(
            state.master.numel(), lambda a, b: update(rule, slab, step, start=a, stop=b)
        )

    return run, state.footprint.host_update


def torch_fused(state: State, wide: torch.Tensor) -> Contender:
    """torch.optim.AdamW(fused=True) with the casts that the task needs."""
    master = torch.nn.Parameter(state.master)
    optimizer = torch.optim.AdamW([master], lr=RULE.lr, weight_decay=0.1, fused=True)

    def run(_: int) -> None:
        torch.mul(state.gradient, SCALE, out=wide)
        master.grad = wide
        optimizer.step()
        state.weight.copy_(master.detach())

    return run, state.footprint.host_update


def deepspeed(state: State, wide: torch.Tensor) -> Contender:
    """DeepSpeedCPUAdam as ZeRO-Offload calls it: widen, scale, update, round."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    master = torch.nn.Parameter(state.master)
    build: Any = DeepSpeedCPUAdam
    optimizer = build([master], lr=RULE.lr, weight_decay=0.1, adamw_mode=True)

    def run(_: int) -> None:
        wide.copy_(state.gradient)
        wide.mul_(SCALE)
        master.grad = wide
        optimizer.step()
        state.weight.copy_(master.detach())

    return run, state.footprint.host_update


def copy(of: torch.Tensor, to: torch.Tensor, pool: CpuPool) -> Contender:
    """Copy fp32 to fp32 with the same threads."""
    source, target = of.numpy(), to.numpy()

    # Not by torch, which would start threads of its own on every thread of the pool.
    def part(start: int, stop: int) -> None:
        np.copyto(target[start:stop], source[start:stop])

    return lambda _: pool.over_range(of.numel(), part), 8


def histogram(gradient: torch.Tensor, pool: CpuPool) -> Contender:
    """Count the magnitudes of a gradient with the same threads."""

    def part(start: int, stop: int) -> None:
        magnitude_histogram(gradient[start:stop], SCALE)

    return lambda _: pool.over_range(gradient.numel(), part), 2


def contenders(elements: int, pool: CpuPool) -> tuple[dict[str, Contender], list[str]]:
    """Return who can run here, and why others cannot."""
    host = HostSlabs(pool, pin=False)
    gradient = host.empty(elements, torch.bfloat16)
    gradient.copy_(torch.randn(elements, generator=torch.Generator().manual_seed(0)))
    wide = host.empty(elements, torch.float32)

    def adam() -> State:
        return State(host, gradient, 2, torch.float32)

    found = {
        name: ours(rule, State(host, gradient, len(rule.moments), dtype), pool)
        for name, (rule, dtype) in RULES.items()
    }
    found["torch fused AdamW, with casts"] = torch_fused(adam(), wide)
    found["histogram of magnitudes"] = histogram(gradient, pool)
    found[COPIED] = copy(host.empty(elements, torch.float32), wide, pool)
    try:
        found["DeepSpeedCPUAdam, with casts"] = deepspeed(adam(), wide)
    except Exception as error:
        return found, [f"DeepSpeedCPUAdam did not run: {type(error).__name__}: {error}"]
    return found, []


def measure(elements: int, rounds: int) -> tuple[list[Row], list[str]]:
    """Time everyone in turn; return rows and notes."""
    pool = CpuPool()
    torch.set_num_threads(pool.threads)
    running, notes = contenders(elements, pool)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(1, rounds + 2):
        for name, (run, _) in running.items():
            start = time.perf_counter()
            run(number)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    rates = {name: elements * running[name][1] / medians[name] / 1e9 for name in running}
    rows: list[Row] = [
        {
            "contender": name,
            "ms": seconds * 1e3,
            "bytes per parameter": running[name][1],
            "GB/s": rates[name],
            "parameters/s": elements / seconds,
            "times as long as our AdamW": seconds / medians[OURS],
        }
        for name, seconds in sorted(medians.items(), key=lambda pair: pair[1])
    ]
    notes.append(f"our AdamW reaches {rates[OURS] / rates[COPIED]:.2f} of the copy's bytes/s")
    notes.append(f"{elements:,} parameters, {pool.threads} threads, median of {rounds} rounds")
    pool.close()
    return rows, notes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu_update.*")
    arguments = parser.parse_args()
    rows, notes = measure(arguments.elements, arguments.rounds)
    print(table(rows))
    print("\n".join(notes))
    if arguments.save:
        save("cpu_update", "Updates on the CPU", rows, notes)


if __name__ == "__main__":
    main()
