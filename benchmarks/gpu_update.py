"""Updates on a GPU: one pass of ours for every rule and form of state, against torch's fused AdamW
with the casts that the task needs, and against a plain copy.

The task is that of mixed precision: a bfloat16 gradient comes in, fp32 master and moments are
updated, a bfloat16 weight goes out, gradients are scaled on the way. torch's fused AdamW needs fp32
gradients: one pass widens and scales before, one rounds after. Rounds alternate in one process;
medians count. Bytes are those of the one-pass task for everyone, so GB/s compare directly; the roof
is what a copy on the device reaches, its own bytes counted. Sums of squares, for the gradient norm,
and histograms of magnitudes, for quantiles, are measured as well.

    python benchmarks/gpu_update.py [--elements 200000000] [--rounds 20] [--save]

Without a GPU it says so and ends with exit status 2.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from results import Row, save, table

from interlace.kernels.update import (
    SGD,
    AdamW,
    CoordinateClip,
    Signum,
    Slab,
    Step,
    UpdateRule,
    clipped_sgd,
    magnitude_histogram,
    split_master,
    sum_of_squares,
    update,
)

SCALE = 0.7
COPIED = "plain copy (the roof)"
FUSED = "torch fused AdamW, with casts"
FORMS = {"fp32 state": (False, False), "split master": (True, False), "all 16 bits": (True, True)}
"""Whether masters are split into weight and remainder, and whether moments are bfloat16."""

ADAMW = AdamW(lr=1e-3, weight_decay=0.1)
RULES: dict[str, UpdateRule] = {
    "adamw": ADAMW,
    "adamw, clipped first moment": CoordinateClip(ADAMW, 0.5),
    "sgd": SGD(lr=1e-3, weight_decay=0.1),
    "clipped sgd": clipped_sgd(threshold=0.5, weight_decay=0.1),
    "clipped sgd without momentum": clipped_sgd(1e-3, 0.5, 0.0, weight_decay=0.1),
    "signum": Signum(weight_decay=0.1),
}
"""A gradient of the benchmark crosses 0.5 often."""

PROBLEM = "gpu_update: needs an NVIDIA GPU, and torch finds none here"

Contender = tuple[Callable[[int], object], int]
"""What to run in round n, and the bytes it moves per element."""


def ours(rule: UpdateRule, gradient: torch.Tensor, split: bool, narrow: bool) -> Contender:
    """One pass over a slab of one form."""
    master = torch.zeros(gradient.numel(), device=gradient.device)
    remainder = None
    if split:
        master, remainder = split_master(master)
    moment = torch.bfloat16 if narrow else torch.float32
    moments = tuple(torch.zeros_like(gradient, dtype=moment) for _ in rule.moments)
    slab = Slab(
        gradient=gradient,
        master=master,
        moments=moments,
        weight=None if split else torch.empty_like(gradient),
        remainder=remainder,
    )
    size = 2 + 2 * (4 + len(moments) * moment.itemsize) + (0 if split else 2)
    return lambda number: update(rule, slab, Step(number, SCALE, rule.hyperparameters())), size


def torch_fused(gradient: torch.Tensor) -> Contender:
    """torch.optim.AdamW(fused=True) with the casts that the task needs."""
    master = torch.nn.Parameter(torch.zeros(gradient.numel(), device=gradient.device))
    optimizer = torch.optim.AdamW([master], lr=1e-3, weight_decay=0.1, fused=True)
    wide, weight = torch.empty_like(master.detach()), torch.empty_like(gradient)
    master.grad = wide

    def run(_: int) -> None:
        torch.mul(gradient, SCALE, out=wide)
        optimizer.step()
        weight.copy_(master.detach())

    return run, 28


def copy(gradient: torch.Tensor) -> Contender:
    """Copy fp32 to fp32."""
    of = torch.zeros(gradient.numel(), device=gradient.device)
    to = torch.empty_like(of)
    return lambda _: to.copy_(of), 8


def contenders(gradient: torch.Tensor) -> dict[str, Callable[[], Contender]]:
    """Return how to set up everyone; the states of all at once might not fit."""
    found: dict[str, Callable[[], Contender]] = {
        f"interlace {name}, {form}": lambda rule=rule, split=split, narrow=narrow: ours(
            rule, gradient, split, narrow
        )
        for name, rule in RULES.items()
        for form, (split, narrow) in FORMS.items()
    }
    found[FUSED] = lambda: torch_fused(gradient)
    found["sum of squares"] = lambda: (lambda _: sum_of_squares(gradient), 2)
    found["histogram of magnitudes"] = lambda: (lambda _: magnitude_histogram(gradient, SCALE), 2)
    found[COPIED] = lambda: copy(gradient)
    return found


def seconds_of(run: Callable[[int], object], rounds: int) -> float:
    """Return the median time of a round on the device; the first compiles and does not count."""
    taken: list[float] = []
    for number in range(1, rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(number)
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken[2:])


def measure(elements: int, rounds: int) -> tuple[list[Row], list[str]]:
    """Time everyone in turn; return rows and notes."""
    generator = torch.Generator("cuda").manual_seed(0)
    gradient = torch.randn(elements, generator=generator, device="cuda").bfloat16()
    measured: dict[str, tuple[float, int]] = {}
    for name, set_up in contenders(gradient).items():
        run, size = set_up()
        measured[name] = seconds_of(run, rounds), size
        del run
        torch.cuda.empty_cache()
    rates = {name: elements * size / seconds / 1e9 for name, (seconds, size) in measured.items()}
    rows: list[Row] = [
        {
            "contender": name,
            "ms": seconds * 1e3,
            "bytes per element": size,
            "GB/s": rates[name],
            "share of the copy": rates[name] / rates[COPIED],
        }
        for name, (seconds, size) in measured.items()
    ]
    times = measured[FUSED][0] / measured["interlace adamw, fp32 state"][0]
    notes = [
        f"{FUSED} takes {times:.2f} times as long as ours",
        f"{elements:,} elements, median of {rounds} rounds",
    ]
    return rows, notes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--elements", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu_update.*")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(PROBLEM, file=sys.stderr)
        sys.exit(2)
    rows, notes = measure(arguments.elements, arguments.rounds)
    print(table(rows))
    print("\n".join(notes))
    if arguments.save:
        save("gpu_update", "Updates on a GPU", rows, notes)


if __name__ == "__main__":
    main()
