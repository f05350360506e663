"""`update`: one call for every rule, dtype and device; it says what is wrong with what it is given.

On a CPU the compiled one-pass kernels run, on a GPU the Triton kernels; float64 slabs, and rules
without kernels, go to the plain formula. All of them do the same arithmetic in the same order.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from interlace.kernels.triton_language import require_triton
from interlace.kernels.update.clip import limits_of
from interlace.kernels.update.limit import Count
from interlace.kernels.update.plain import has_kernels, update_plain
from interlace.kernels.update.rules import UpdateRule
from interlace.kernels.update.slab import Slab, Step, rounding_keys

FLOATS = (torch.float32, torch.bfloat16)

SHORT = 2**20
"""Slabs up to so many elements share a launch on a GPU; longer ones keep it busy for longer than a
launch takes.
"""

SQUARED_AT_ONCE = 2**24
"""Elements that are widened to float64 together where there is no kernel."""


def update(
    rule: UpdateRule, slab: Slab, step: Step, *, start: int = 0, stop: int | None = None
) -> Count:
    """Update elements `start` to `stop` of a slab in place.

    Returns:
        How many coordinates a `CoordinateClip` cut: those beyond the threshold, and those of the
        gradient that are not finite; 0 for other rules. An int, or of a slab on a GPU a 0-d int64
        tensor there.

    Raises:
        TypeError: A tensor has a dtype that the rule's kernels do not take.
        ValueError: Tensors differ in length or device, the number of moments is wrong, or a value
            of `step.hyper` is outside its range.
    """
    check(rule, slab)
    stop = slab.gradient.numel() if stop is None else stop
    if start >= stop:
        return 0
    whole = (start, stop) == (0, slab.gradient.numel())
    part = slab if whole else cut(slab, start, stop)
    if slab.master.dtype is torch.float64 or not has_kernels(rule):
        return update_plain(rule, part, step, step.first_element + start)
    if slab.master.device.type == "cpu":
        return update_on_cpu(rule, part, step, step.first_element + start)
    return gpu_kernels().update_on_gpu(rule, part, step, step.first_element + start)


def update_many(rule: UpdateRule, slabs: Sequence[Slab], steps: Sequence[Step]) -> list[Count]:
    """Update several slabs in place, each as `update` would: the same bits.

    On a GPU short slabs of the same dtypes share a launch, which would otherwise take longer than
    the update itself; update numbers and hyperparameters may differ.

    Returns:
        What `update` returns of each.

    Raises:
        TypeError: As `update`.
        ValueError: As `update`.
    """
    counts: list[Count] = [0] * len(slabs)
    together: dict[tuple[object, ...], list[int]] = {}
    for number, (slab, step) in enumerate(zip(slabs, steps, strict=True)):
        count = slab.gradient.numel()
        compiled = has_kernels(rule) and slab.master.dtype is not torch.float64
        if compiled and slab.gradient.is_cuda and 0 < count <= SHORT:
            check(rule, slab)
            together.setdefault(form_of(slab), []).append(number)
        else:
            counts[number] = update(rule, slab, step)
    for found in together.values():
        cut = gpu_kernels().update_many_on_gpu(
            rule, [slabs[number] for number in found], [steps[number] for number in found]
        )
        for number, count in zip(found, cut, strict=True):
            counts[number] = count
    return counts


def form_of(slab: Slab) -> tuple[object, ...]:
    """Return what slabs have in common that one launch can update."""
    dtypes = (slab.gradient.dtype, slab.master.dtype, *(moment.dtype for moment in slab.moments))
    weight = None if slab.weight is None else slab.weight.dtype
    return (*dtypes, weight, slab.remainder is None, slab.gradient.device)


def check(rule: UpdateRule, slab: Slab) -> None:
    """Raise unless a slab is one that the kernels of a rule can update."""
    named = {"gradient": slab.gradient, "master": slab.master, "weight": slab.weight}
    named |= {f"moment {n}": moment for n, moment in enumerate(slab.moments)}
    named["remainder"] = slab.remainder
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    if len(slab.moments) != len(rule.moments):
        raise ValueError(f"rule {rule.name} keeps {rule.moments}, given {len(slab.moments)}")
    for name, tensor in present.items():
        if tensor.shape != slab.gradient.shape or tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the gradient "
                f"{tuple(slab.gradient.shape)}; all must be 1-D, contiguous and equally long"
            )
        if tensor.device != slab.gradient.device:
            raise ValueError(f"{name} is on {tensor.device}, not on {slab.gradient.device}")
    allowed: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(present, FLOATS)
    allowed["master"] = (torch.float32,) if slab.remainder is None else (torch.bfloat16,)
    if slab.master.dtype is torch.float64 and slab.remainder is None:
        allowed = dict.fromkeys(present, (torch.float64,))
    allowed["remainder"] = (torch.int16,)
    for name, tensor in present.items():
        if tensor.dtype not in allowed[name]:
            wanted = " or ".join(str(dtype) for dtype in allowed[name])
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {wanted}")


def cut(slab: Slab, start: int, stop: int) -> Slab:
    """Return a range of a slab, as views."""

    def piece(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[start:stop]

    return Slab(
        gradient=slab.gradient[start:stop],
        master=slab.master[start:stop],
        moments=tuple(moment[start:stop] for moment in slab.moments),
        weight=piece(slab.weight),
        remainder=piece(slab.remainder),
    )


def update_on_cpu(rule: UpdateRule, slab: Slab, step: Step, position: int) -> int:
    """Run the compiled kernel over a whole slab; return how many coordinates it cut."""
    from interlace.kernels.update.cpu import KERNELS, STATE

    scalars = tuple(np.float32(value) for value in rule.scalars(step.number, step.hyper))
    limits = limits_of(rule, step.number, step.hyper)
    before, after = (None if limit is None else np.float32(limit) for limit in limits)
    moments = [as_array(moment) for moment in slab.moments]
    cut: int = KERNELS[rule.name](
        as_array(slab.gradient),
        as_array(slab.master),
        *moments,
        *[None] * (STATE[rule.name] - len(moments)),
        None if slab.weight is None else as_array(slab.weight),
        None if slab.remainder is None else as_array(slab.remainder),
        np.float32(step.gradient_scale),
        scalars,
        before,
        after,
        np.uint32(position & 0xFFFFFFFF),
        # A rule without state rounds none, but a kernel takes no empty tuple.
        rounding_keys(rule, step) or (np.uint32(0),),
    )
    return cut


def as_array(tensor: torch.Tensor) -> Any:
    """Return a CPU tensor as a numpy array over the same memory; bfloat16 as its 16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@cache
def gpu_kernels() -> ModuleType:
    """Return the module of Triton kernels, or raise `ImportError` that says what to install."""
    require_triton("Updating on a GPU")
    return importlib.import_module("interlace.kernels.update.gpu")


def accumulate(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add values to totals in place: 1-D, equally long; float32 totals, and on a CPU with the GIL
    free and on the calling thread alone. On a GPU torch widens bfloat16 in the same pass.
    """
    if total.device.type == "cpu" and total.dtype is torch.float32 and values.dtype in FLOATS:
        from interlace.kernels.update.cpu import add

        add(as_array(total), as_array(values))
    else:
        total.add_(values)


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of a 1-D tensor, 0-d float64, on its device.

    It depends on nothing but the values, not on thread counts or memory alignment; CPU and GPU
    add in different orders. Infinities and NaN carry over.
    """
    if tensor.device.type == "cpu" and tensor.dtype in FLOATS:
        from interlace.kernels.update.cpu import squares

        return torch.tensor(squares(as_array(tensor)), dtype=torch.float64, device="cpu")
    if tensor.is_cuda:
        return gpu_kernels().sum_of_squares_on_gpu(tensor)
    # In pieces: in float64 a long gradient would take eight bytes per element, twice over.
    pieces = [piece.double().square().sum() for piece in tensor.split(SQUARED_AT_ONCE)]
    return torch.stack(pieces).sum()


def warm_up(
    rule: UpdateRule, weight: torch.dtype, moment: torch.dtype, split_master: bool = False
) -> None:
    """Compile (or load from disk) what updates of such weights will need on the CPU."""
    if weight is torch.float64:
        return

    def one(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, dtype=dtype, device="cpu")

    for gradient in {weight, torch.float32}:
        slab = Slab(
            gradient=one(gradient),
            master=one(weight if split_master else torch.float32),
            moments=tuple(one(moment) for _ in rule.moments),
            weight=None if split_master or weight is torch.float32 else one(weight),
            remainder=one(torch.int16) if split_master else None,
        )
        update(rule, slab, Step(1, 1.0, rule.hyperparameters()))
        sum_of_squares(slab.gradient)
        accumulate(one(torch.float32), slab.gradient)
