"""What a mixer may look at: shapes, time, documents and the other rows.

Whatever must not matter is replaced, and what must not move is compared bit for bit.
"""

import torch

from interlace.trainer.conformance.outcome import Outcome, exempt, judged
from interlace.trainer.conformance.subject import LENGTH, Subject, distance, forward
from interlace.trainer.models.context import Routed

CHANGED = LENGTH // 2
"""The position that is replaced."""

DOCUMENTS = (5, 1, LENGTH - 6)
"""Lengths of packed documents: a few positions, a single one, and the rest."""

TOLERANCE = 1e-5
"""Share of the largest value by which fp32 results may differ when summed in another order."""


@torch.no_grad()
def shapes(subject: Subject) -> Outcome:
    """(B, T, D) comes back as (B, T, D), also for one row, one position and an odd number."""
    module = subject.module()
    wrong: list[str] = []
    for rows, length in ((1, 1), (1, 7), (3, 2), (2, LENGTH)):
        x = subject.rows(rows, length)
        mixed = module(x, subject.context(x))
        wrong += [f"{tuple(x.shape)}: {text}" for text in misshapen(mixed, x)]
    return judged(
        not wrong,
        "; ".join(wrong) or "4 shapes, fp32",
        "output as the input, finite",
        "`forward` returns a tensor of the shape and dtype of `x`, or a `Routed` with one, a "
        "scalar loss and int64 loads",
    )


@torch.no_grad()
def bfloat16(subject: Subject) -> Outcome:
    """A model in bfloat16 gives bfloat16, finite, and near to what fp32 gives."""
    x = subject.rows(2, LENGTH, torch.bfloat16)
    narrow = subject.module(torch.bfloat16)
    mixed = narrow(x, subject.context(x))
    wrong = misshapen(mixed, x)
    if wrong:
        return judged(False, "; ".join(wrong), "bfloat16", "cast weights to `x.dtype` at use")
    wide = subject.module().double()
    for parameter, source in zip(wide.parameters(), narrow.parameters(), strict=True):
        parameter.data.copy_(source.data)
    exact = x.double()
    found = forward(narrow, x, subject.context(x)).double()
    expected = forward(wide, exact, subject.context(exact))
    # Half the positions may be far off where a discrete choice falls the other way.
    away = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    typical = float(away.median())
    return judged(
        typical <= 0.05,
        f"median position is {typical:.2%} off fp64",
        "5%",
        "sums over many terms, exponentials and decays belong in fp32: widen there and cast back",
    )


def misshapen(mixed: object, x: torch.Tensor) -> list[str]:
    """Return what is wrong with a result for input `x`."""
    output = mixed
    wrong: list[str] = []
    if isinstance(mixed, Routed):
        output = mixed.output
        if mixed.loss.ndim:
            wrong.append(f"loss has shape {tuple(mixed.loss.shape)}, not ()")
        if mixed.load.ndim != 1 or mixed.load.dtype is not torch.int64:
            wrong.append(f"load is {mixed.load.dtype} {tuple(mixed.load.shape)}, not int64 (E,)")
    if not isinstance(output, torch.Tensor):
        return [*wrong, f"returns {type(output).__name__}"]
    if output.shape != x.shape:
        wrong.append(f"gives {tuple(output.shape)}")
    if output.dtype != x.dtype:
        wrong.append(f"gives {output.dtype} for {x.dtype}")
    if not bool(torch.isfinite(output).all()):
        wrong.append("is not finite")
    return wrong


@torch.no_grad()
def moved(subject: Subject) -> list[int]:
    """Return the positions whose output changes when one position's input is replaced.

    Every bit counts. Where tokens are sent to experts the groups change with the input, and with
    them the order in which products are summed: there fp64 is asked to agree to 1e-12.
    """
    x = subject.rows(2)
    routed = isinstance(subject.module()(x, subject.context(x)), Routed)
    dtype, least = (torch.float64, 1e-12) if routed else (torch.float32, 0.0)
    module, x = subject.module(dtype), x.to(dtype)
    changed = x.clone()
    changed[:, CHANGED] = subject.rows(2, LENGTH, dtype, seed=2)[:, CHANGED]
    before = forward(module, x, subject.context(x))
    after = forward(module, changed, subject.context(changed))
    differences = (before - after).abs().amax((0, 2)) / before.abs().max()
    return (differences > least).nonzero().flatten().tolist()


def causality(subject: Subject) -> Outcome:
    """No bit of the output depends on a later position."""
    if not subject.kind.traits.causal:
        return exempt("it is declared not causal")
    seen = [place for place in moved(subject) if place < CHANGED]
    first = f", the first {CHANGED - seen[0]} before it" if seen else ""
    return judged(
        not seen,
        f"{len(seen)} of {CHANGED} earlier positions see a change{first}",
        "0",
        "position t may read inputs up to t only: look for a mean, norm, sort or padding over the "
        "whole row; if it is meant to look ahead, declare Traits(causal=False)",
    )


def reach(subject: Subject) -> Outcome:
    """A sequence mixer carries information on; a channel mixer works on every position alone."""
    causal = subject.kind.traits.causal
    later = [
        place for place in moved(subject) if place > CHANGED or not (causal or place == CHANGED)
    ]
    if subject.mixes_positions:
        return judged(
            bool(later),
            f"{len(later)} of {LENGTH - CHANGED - 1} later positions see a change",
            "1 or more",
            "nothing passes from one position to the next; if that is meant, register it with "
            "@channel_mixer",
        )
    return judged(
        not later,
        f"{len(later)} later positions see a change",
        "0",
        "it moves information between positions: register it with @sequence_mixer",
    )


@torch.no_grad()
def rows(subject: Subject) -> Outcome:
    """What a row gives does not depend on the rows beside it."""
    module, x = subject.module(), subject.rows(3)
    beside = x.clone()
    beside[1:] = subject.rows(3, seed=2)[1:]
    first = forward(module, x, subject.context(x))[:1]
    replaced = forward(module, beside, subject.context(beside))[:1]
    alone = forward(module, x[:1], subject.context(x[:1]))
    worst = max(distance(replaced, first), distance(alone, first))
    return judged(
        worst <= TOLERANCE,
        f"{worst:.1e} of the largest value",
        f"{TOLERANCE:.0e}",
        "a sum, mean or norm runs over the batch dimension, or rows compete for room",
    )


@torch.no_grad()
def documents(subject: Subject) -> Outcome:
    """Packed documents give what each gives alone."""
    if not subject.kind.traits.resets:
        return exempt("it is declared to cross document boundaries")
    module, x = subject.module(), subject.rows(2)
    lengths = torch.tensor(DOCUMENTS)
    segments = torch.arange(len(DOCUMENTS)).repeat_interleave(lengths).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(2, -1)
    packed = forward(module, x, subject.context(x, segments=segments, positions=positions))
    pieces = x.split(DOCUMENTS, 1)
    apart = torch.cat([forward(module, piece, subject.context(piece)) for piece in pieces], 1)
    worst = distance(packed, apart)
    return judged(
        worst <= TOLERANCE,
        f"{worst:.1e} of the largest value",
        f"{TOLERANCE:.0e}",
        "`context.segments` (B, T) numbers the documents: mask, or start the state anew, wherever "
        "the number changes; or declare Traits(resets=False)",
    )
