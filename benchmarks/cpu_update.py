"""AdamW on the CPU: one pass of ours against separate passes of others, and against a plain copy.

The task is that of offloading: a bfloat16 gradient comes in, fp32 master and moments are updated, a
bfloat16 weight goes out, gradients are scaled on the way. Ours does it in one pass. torch's fused
AdamW and DeepSpeedCPUAdam need fp32 gradients, so each gets a pass that widens (and scales) before
and one that rounds after. Rounds alternate in one process; medians count. Bytes are those of the
one-pass task (28 per parameter) for everyone, so GB/s compare directly; the roof is what a copy
with as many threads reaches, its own bytes counted.

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

from interlace.kernels.update import AdamW, Slab, Step, update
from interlace.offload.cores import CpuPool
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Footprint

FOOTPRINT = Footprint(weight=2, gradient=2, state=12)
RULE = AdamW(lr=1e-3, weight_decay=0.1)
SCALE = 0.7
COPIED = "plain copy (the roof)"
OURS = "interlace, one pass"

Contender = Callable[[int], None]


class State:
    """Gradient, master, moments and weight of one contender, touched by the pool's threads."""

    def __init__(self, elements: int, host: HostSlabs, gradient: torch.Tensor) -> None:
        self.gradient = gradient
        self.master = host.empty(elements, torch.float32)
        self.first = host.empty(elements, torch.float32)
        self.second = host.empty(elements, torch.float32)
        self.weight = host.empty(elements, torch.bfloat16)
        self.wide = host.empty(elements, torch.float32)


def ours(state: State, pool: CpuPool) -> Contender:
    """One pass on threads of our own."""
    slab = Slab(state.gradient, state.master, (state.first, state.second), state.weight)

    def run(number: int) -> None:
        step = Step(number, SCALE, RULE.hyperparameters())
        pool.over_range(
            state.master.numel(), lambda a, b: update(RULE, slab, step, start=a, stop=b)
        )

    return run


def torch_fused(state: State) -> Contender:
    """torch.optim.AdamW(fused=True) with the casts that the task needs."""
    master = torch.nn.Parameter(state.master)
    optimizer = torch.optim.AdamW([master], lr=RULE.lr, weight_decay=0.1, fused=True)

    def run(_: int) -> None:
        torch.mul(state.gradient, SCALE, out=state.wide)
        master.grad = state.wide
        optimizer.step()
        state.weight.copy_(master.detach())

    return run


def deepspeed(state: State) -> Contender:
    """DeepSpeedCPUAdam as ZeRO-Offload calls it: widen, scale, update, round."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    master = torch.nn.Parameter(state.master)
    build: Any = DeepSpeedCPUAdam
    optimizer = build([master], lr=RULE.lr, weight_decay=0.1, adamw_mode=True)

    def run(_: int) -> None:
        state.wide.copy_(state.gradient)
        state.wide.mul_(SCALE)
        master.grad = state.wide
        optimizer.step()
        state.weight.copy_(master.detach())

    return run


def copy(state: State, pool: CpuPool) -> Contender:
    """Copy fp32 to fp32 with the same threads."""

    to, of = state.wide.numpy(), state.master.numpy()

    # Not by torch, which would start threads of its own on every thread of the pool.
    def part(start: int, stop: int) -> None:
        np.copyto(to[start:stop], of[start:stop])

    return lambda _: pool.over_range(state.master.numel(), part)


def contenders(elements: int, pool: CpuPool) -> tuple[dict[str, Contender], list[str]]:
    """Return who can run here, and why others cannot."""
    host = HostSlabs(pool, pin=False)
    gradient = host.empty(elements, torch.bfloat16)
    gradient.copy_(torch.randn(elements, generator=torch.Generator().manual_seed(0)))
    found = {
        OURS: ours(State(elements, host, gradient), pool),
        "torch fused AdamW, with casts": torch_fused(State(elements, host, gradient)),
        COPIED: copy(State(elements, host, gradient), pool),
    }
    try:
        found["DeepSpeedCPUAdam, with casts"] = deepspeed(State(elements, host, gradient))
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
        for name, run in running.items():
            start = time.perf_counter()
            run(number)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    rows: list[Row] = []
    for name, seconds in sorted(medians.items(), key=lambda pair: pair[1]):
        size = 8 if name == COPIED else FOOTPRINT.host_update
        rows.append(
            {
                "contender": name,
                "ms": seconds * 1e3,
                "GB/s": elements * size / seconds / 1e9,
                "parameters/s": elements / seconds,
                "times as long as ours": seconds / medians[OURS],
            }
        )
    rates = {row["contender"]: row["GB/s"] for row in rows}
    ours_rate, roof = rates[OURS], rates[COPIED]
    assert isinstance(ours_rate, float) and isinstance(roof, float)
    notes.append(f"ours reaches {ours_rate / roof:.2f} of the copy's bytes per second")
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
        save("cpu_update", "AdamW on the CPU", rows, notes)


if __name__ == "__main__":
    main()
