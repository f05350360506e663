"""What a mixer says it costs against what it does: parameters, FLOPs, memory until backward."""

import gc
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from interlace.trainer.conformance.decoding import short
from interlace.trainer.conformance.live_memory import LiveTensors
from interlace.trainer.conformance.outcome import Outcome, judged
from interlace.trainer.conformance.subject import Subject, output_of
from interlace.trainer.parallel import checkpointed

LENGTH = 64
"""Positions of a row."""

TOLERANCE = 0.02
"""Share by which declared memory may miss the measured one."""


def torch_forward(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Count the products of torch's fused attention."""
    return sdpa_flop_count(q, k, v)


def torch_backward(
    gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Count those of its backward."""
    return sdpa_backward_flop_count(gradient, q, k, v)


def our_forward(
    backend: str, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Count the products of our fused attention."""
    return sdpa_flop_count(q, k, v)


def our_backward(
    backend: str, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Count those of its backward; the gradient has the shape of the queries."""
    return sdpa_backward_flop_count(q, q, k, v)


def fused_attention() -> dict[object, Callable[..., int]]:
    """Return how to count fused attention: torch's counter knows that of GPUs only."""
    importlib.import_module("interlace.kernels.attention.operators")
    torchs, ours = torch.ops.aten, torch.ops.interlace
    return {
        torchs._scaled_dot_product_flash_attention_for_cpu: torch_forward,
        torchs._scaled_dot_product_flash_attention_for_cpu_backward: torch_backward,
        ours.attention_forward: our_forward,
        ours.attention_backward: our_backward,
    }


def parameter_count(subject: Subject) -> Outcome:
    """The declared number of parameters is that of the module."""
    declared = subject.kind.parameter_count(subject.config)
    measured = sum(parameter.numel() for parameter in subject.empty().parameters())
    return judged(
        declared == measured,
        f"{measured:,} of {declared:,} declared",
        "equal",
        "parameter_count(config) adds up every weight, gain and bias of the module",
    )


def flops(subject: Subject) -> Outcome:
    """The declared matrix FLOPs are those that torch's counter sees, forward and backward."""
    declared = subject.kind.flops_per_token(subject.config, LENGTH)
    module, x = subject.module(), subject.rows(2, LENGTH).requires_grad_()
    # What is the same in every call (masks, tables) is made before.
    context = subject.context(x)
    with counting() as counter:
        mixed = output_of(module(x, context))
    forward = counter.get_total_flops() / (2 * LENGTH)
    with counting() as counter:
        mixed.sum().backward()
    backward = counter.get_total_flops() / (2 * LENGTH)
    return judged(
        (forward, backward) == (declared.forward, declared.backward),
        f"{forward:,.0f} forward and {backward:,.0f} backward per token, of "
        f"{declared.forward:,} and {declared.backward:,} declared",
        "equal",
        f"flops_per_token(config, {LENGTH}) counts 2 per multiply-add of matrix products, twice as "
        "much for their backward (input and weight), and nothing else",
    )


def counting() -> FlopCounterMode:
    """Return a counter of matrix FLOPs."""
    return FlopCounterMode(display=False, custom_mapping=fused_attention())


def saved_bytes(subject: Subject) -> Outcome:
    """What stays in memory until backward is as declared."""
    saved = subject.kind.saved_elements(subject.config, LENGTH)
    found = [
        compare(subject, dtype, selective=False, narrow=saved.kept, wide=saved.kept_wide)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return memory_verdict(
        found,
        f"saved_elements(config, {LENGTH}): kept counts what autograd keeps of a token in the "
        "compute dtype, kept_wide what it keeps in fp32; the mixer's input belongs to the norm",
    )


def product_bytes(subject: Subject) -> Outcome:
    """With selective recomputation, results of matrix products and attention stay as declared."""
    saved = subject.kind.saved_elements(subject.config, LENGTH)
    found = [
        compare(subject, dtype, selective=True, narrow=saved.products, wide=saved.products_wide)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return memory_verdict(
        found,
        f"saved_elements(config, {LENGTH}): products counts the results of matrix products and "
        "attention for one token in the compute dtype, products_wide those in fp32",
    )


def memory_verdict(found: list[tuple[bool, str]], advice: str) -> Outcome:
    """Judge the comparisons of all dtypes together."""
    right = all(kept for kept, _ in found)
    text = "; ".join(text for _, text in found)
    return judged(right, text, f"within {TOLERANCE:.0%}", advice)


def compare(
    subject: Subject, dtype: torch.dtype, *, selective: bool, narrow: int, wide: int
) -> tuple[bool, str]:
    """Return whether declared and measured bytes of a token agree, and both in words."""
    declared = narrow * dtype.itemsize + wide * 4
    # Casts of weights live as long, but their size does not depend on the number of rows.
    alive = [alive_bytes(subject, rows, dtype, selective) for rows in (1, 3)]
    measured = (alive[1] - alive[0]) / (2 * LENGTH)
    right = abs(measured - declared) <= TOLERANCE * max(measured, declared)
    return right, f"{measured:,.0f} of {declared:,} bytes per token declared ({short(dtype)})"


def alive_bytes(subject: Subject, rows: int, dtype: torch.dtype, selective: bool) -> int:
    """Return what a forward pass over rows of two documents leaves alive for its backward."""
    module = subject.module(dtype)
    x = subject.rows(rows, LENGTH, dtype).requires_grad_()
    segments = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(rows, -1).contiguous()
    context = subject.context(x, segments=segments)
    call: Callable[..., Any] = checkpointed(True, module.forward) if selective else module
    # What is made of the documents once, for all layers, is no mixer's own.
    call(x, context)
    with LiveTensors(views_of_outside=False) as tensors:
        # The sum needs no more than the shape: the output itself may go.
        value = output_of(call(x, context)).sum()
    # What is in cycles was made just now: to look at older objects as well takes long.
    gc.collect(1)
    assert value.requires_grad, "there is something to go backward through"
    return tensors.bytes() - value.untyped_storage().nbytes()
