"""Decoding: what comes token by token is what comes at once, and a new cache knows nothing."""

import gc
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from interlace.trainer.conformance.behaviour import TOLERANCE
from interlace.trainer.conformance.live_memory import LiveTensors
from interlace.trainer.conformance.outcome import Outcome, judged
from interlace.trainer.conformance.subject import LENGTH, Subject, distance, forward
from interlace.trainer.models.context import LayerCache
from interlace.trainer.models.registry import Mixer

PROMPT = 40
"""Positions of a prompt."""

PIECES = (PROMPT, 2, LENGTH - PROMPT - 2)
"""A prompt that comes in parts."""


def new_cache(
    module: nn.Module, rows: int, dtype: torch.dtype = torch.float32
) -> LayerCache | None:
    """Return empty decoding state with room for `LENGTH` positions."""
    return cast(Mixer, module).new_cache(rows, LENGTH, torch.empty(0, dtype=dtype))


@torch.no_grad()
def decoded(
    subject: Subject,
    module: nn.Module,
    x: torch.Tensor,
    pieces: Sequence[int],
    cache: LayerCache | None,
) -> torch.Tensor:
    """Return the output (B, T, D) where the input comes in pieces."""
    outputs: list[torch.Tensor] = []
    start = 0
    for piece in x.split(list(pieces), 1):
        outputs.append(forward(module, piece, subject.context(piece, start=start, cache=cache)))
        start += piece.shape[1]
    return torch.cat(outputs, 1)


def in_pieces(subject: Subject, ways: Sequence[Sequence[int]], advice: str) -> Outcome:
    """Hold the output of decodings in pieces against one pass over the whole row."""
    module, x = subject.module(), subject.rows(2)
    with torch.no_grad():
        whole = forward(module, x, subject.context(x))
    found = [decoded(subject, module, x, pieces, new_cache(module, 2)) for pieces in ways]
    worst = max(distance(each, whole) for each in found)
    return judged(
        worst <= TOLERANCE, f"{worst:.1e} of the largest value", f"{TOLERANCE:.0e}", advice
    )


def step_by_step(subject: Subject) -> Outcome:
    """Decoding one token at a time, from nothing or after a prompt, gives what one pass over the
    row gives.
    """
    return in_pieces(
        subject,
        [[1] * LENGTH, [PROMPT, *[1] * (LENGTH - PROMPT)]],
        "with `context.cache` the input is the positions that follow those in the cache: read the "
        "past from it, add to it, and count `length` up",
    )


def prompt_in_parts(subject: Subject) -> Outcome:
    """A prompt may come in parts of any length."""
    return in_pieces(
        subject,
        [PIECES],
        f"parts of {', '.join(map(str, PIECES))} positions differ from one pass: a part of many "
        "positions must go on from the cache as well, not from the start",
    )


def fresh_cache(subject: Subject) -> Outcome:
    """A new cache remembers nothing, two that are used in turns do not mix, and a pass without one
    leaves no trace.
    """
    module = subject.module()
    one, other = subject.rows(2), subject.rows(2, seed=2)
    steps = [1] * LENGTH
    untouched = deepcopy(module)
    expected = decoded(subject, untouched, other, steps, new_cache(untouched, 2))
    with torch.no_grad():
        forward(module, one, subject.context(one))
    decoded(subject, module, one, steps, new_cache(module, 2))
    after = decoded(subject, module, other, steps, new_cache(module, 2))
    caches = new_cache(module, 2), new_cache(module, 2)
    turns: list[torch.Tensor] = []
    for place in range(LENGTH):
        for x, cache in zip((one, other), caches, strict=True):
            piece = x[:, place : place + 1]
            context = subject.context(piece, start=place, cache=cache)
            with torch.no_grad():
                turns.append(forward(module, piece, context))
    mixed = torch.cat(turns[1::2], 1)
    worst = max(distance(after, expected), distance(mixed, expected))
    return judged(
        worst == 0.0,
        f"{worst:.1e} of the largest value",
        "equal bits",
        "what is remembered belongs into the object that `new_cache` returns, nowhere else: look "
        "for tensors kept on `self`, on the class or in the module",
    )


def cache_contract(subject: Subject) -> Outcome:
    """The cache is of the declared kind and counts its positions."""
    module, x = subject.module(), subject.rows(2)
    cache, kind = new_cache(module, 2), subject.kind.traits.decoding
    if kind == "nothing":
        wrong = [] if cache is None else [f"new_cache gives {type(cache).__name__}, not None"]
    elif cache is None:
        wrong = ["new_cache gives None"]
    else:
        found = [cache.length]
        for pieces in (1, LENGTH - 1):
            decoded(subject, module, x[:, :pieces], [pieces], cache)
            found.append(cache.length)
        expected = [0, 1, LENGTH]
        wrong = [] if found == expected else [f"length goes {found}, not {expected}"]
    if kind == "nothing" and subject.mixes_positions:
        wrong.append("a sequence mixer remembers something")
    return judged(
        not wrong,
        "; ".join(wrong) or f"decodes with {kind}",
        f"decoding={kind!r}",
        "traits.decoding, new_cache and the cache's `length` must tell the same: positions that "
        "are in it",
    )


def cache_bytes(subject: Subject) -> Outcome:
    """The declared size of the cache is that of its tensors."""
    if subject.kind.traits.decoding == "nothing":
        declared = subject.kind.cache_bytes(subject.config, LENGTH, 4)
        advice = "cache_bytes must be 0: traits.decoding says that nothing is remembered"
        return judged(declared == 0, f"{declared} bytes declared", "0", advice)
    found: list[str] = []
    right = True
    for dtype in (torch.float32, torch.bfloat16):
        declared = subject.kind.cache_bytes(subject.config, LENGTH, dtype.itemsize)
        measured = (held_bytes(subject, 3, dtype) - held_bytes(subject, 1, dtype)) / 2
        right = right and measured == declared
        found.append(f"{measured:,.0f} of {declared:,} declared ({short(dtype)})")
    return judged(
        right,
        "; ".join(found),
        "equal",
        f"cache_bytes(config, length, element_bytes) counts what one sequence of {LENGTH} "
        "positions keeps once they are decoded, fp32 parts with 4 bytes",
    )


@torch.no_grad()
def held_bytes(subject: Subject, rows: int, dtype: torch.dtype) -> int:
    """Return what is alive once `LENGTH` positions are in a cache, the output left out."""
    module, x = subject.module(dtype), subject.rows(rows, LENGTH, dtype)
    context = subject.context(x)
    with LiveTensors(views_of_outside=False) as tensors:
        cache = new_cache(module, rows, dtype)
        forward(module, x, replace(context, cache=cache))
    gc.collect(1)
    held = tensors.bytes()
    # Named again, so that the cache lives until here.
    del cache
    return held


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without its package."""
    return str(dtype).removeprefix("torch.")
