"""The rest of a training step: head, norms, rotary embedding and gate, as they are and compiled.

Forward and backward of every operation, eager beside `torch.compile`; of the head also torch's own
`linear_cross_entropy` and the whole logits at once. On a GPU in bfloat16, elsewhere in float32, at
the shapes of a small model's layer. Rounds alternate; medians count.

An operation of ours in Triton would have to beat the compiled column by a clear margin.

    python benchmarks/step_ops.py [--tokens 4096] [--width 768] [--rounds 9] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from results import Row, save, table
from torch.nn import functional

from interlace.kernels import (
    add_rms_norm,
    apply_rotary,
    gated_rms_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_tables,
    swiglu,
)

HEAD_WIDTH, VOCABULARY = 64, 32_000
OURS = "head: interlace"

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One implementation of one operation.

    Attributes:
        name: For the table.
        call: What is measured; its results are summed and differentiated.
        inputs: What it takes; those that are floating get gradients.
    """

    name: str
    call: Operation
    inputs: Sequence[torch.Tensor]


def layer_cases(tokens: int, width: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Return what happens inside layers."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, y, gain = normal(tokens, width), normal(tokens, width), normal(width).float()
    hidden = 4 * width * 2 // 3
    heads = normal(1, width // HEAD_WIDTH, tokens, HEAD_WIDTH)
    positions = torch.arange(tokens, device=device)[None]
    cosine, sine = (table.to(dtype) for table in rotary_tables(positions, HEAD_WIDTH, 1e4))
    return [
        Case("rms_norm", lambda x, gain: rms_norm(x, gain, 1e-5), (x, gain)),
        Case("add_rms_norm", lambda x, y, gain: add_rms_norm(x, y, gain, 1e-5), (x, y, gain)),
        Case("gated_rms_norm", lambda x, y, gain: gated_rms_norm(x, y, gain, 1e-5), (x, y, gain)),
        Case("apply_rotary", lambda x: apply_rotary(x, cosine, sine), (heads,)),
        Case("swiglu", swiglu, (normal(tokens, hidden), normal(tokens, hidden))),
        Case(
            "silu(gate) * up by autograd",
            lambda gate, up: functional.silu(gate) * up,
            (normal(tokens, hidden), normal(tokens, hidden)),
        ),
    ]


def head_cases(tokens: int, width: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Return the ways to the loss."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(VOCABULARY, width, generator=generator, device=device) / width**0.5
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    cases = [
        Case(OURS, lambda h, w: linear_cross_entropy(h, w, targets).objective, (hidden, weight)),
        Case(
            "head: all logits at once",
            lambda h, w: functional.cross_entropy(
                functional.linear(h, w.to(h.dtype)).float(), targets
            ),
            (hidden, weight),
        ),
    ]
    theirs: Any = getattr(functional, "linear_cross_entropy", None)
    if theirs is not None:
        options: Any = torch.nn.LinearCrossEntropyOptions
        for policy, chunks in (("auto", "auto"), ("accurate", "aspect_ratio")):
            chosen = options(acc_policy=policy, chunking_method=chunks)
            cases.append(
                Case(
                    f"head: torch, {policy}",
                    lambda h, w, chosen=chosen: theirs(h, w.to(h.dtype), targets, options=chosen),
                    (hidden, weight),
                )
            )
    return cases


def once(case: Case, call: Operation) -> float:
    """Return the seconds of forward and backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs]
    synchronize()
    start = time.perf_counter()
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(list(results), [torch.ones_like(result) for result in results])
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(tokens: int, width: int, rounds: int) -> tuple[list[Row], list[str]]:
    """Time everyone in turn; return rows and notes."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    layers = layer_cases(tokens, width, device, dtype)
    head = head_cases(tokens, width, device, dtype)
    # The head is called outside what is compiled.
    calls: list[tuple[Case, str, Operation]] = [(case, "eager ms", case.call) for case in head]
    for case in layers:
        calls.append((case, "eager ms", case.call))
        calls.append((case, "compiled ms", torch.compile(case.call)))
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 2):
        for case, how, call in calls:
            times.setdefault((case.name, how), []).append(once(case, call) * 1e3)
    medians = {key: statistics.median(taken[2:]) for key, taken in times.items()}
    rows: list[Row] = []
    for case in (*head, *layers):
        eager, compiled = medians[case.name, "eager ms"], medians.get((case.name, "compiled ms"))
        row: dict[str, object] = {"operation": case.name, "eager ms": eager}
        if compiled is not None:
            row |= {"compiled ms": compiled, "eager / compiled": eager / compiled}
        rows.append(row)
    words = f"{tokens:,} tokens, width {width}, vocabulary {VOCABULARY:,}, {dtype} on {device}"
    return rows, [f"forward and backward of {words}; median of {rounds} rounds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_ops-*")
    arguments = parser.parse_args()
    rows, notes = measure(arguments.tokens, arguments.width, arguments.rounds)
    print(table(rows))
    print("\n".join(notes))
    if arguments.save:
        where = "gpu" if torch.cuda.is_available() else "cpu"
        save(f"step_ops-{where}", "The rest of a training step", rows, notes)


if __name__ == "__main__":
    main()
