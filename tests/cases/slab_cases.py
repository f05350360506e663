"""Slabs of every form, and copies of them."""

from collections.abc import Callable

import pytest
import torch

from interlace.kernels.update import (
    SGD,
    AdamW,
    CoordinateClip,
    Signum,
    Slab,
    Step,
    UpdateRule,
    clipped_sgd,
    split_master,
)

RULES: dict[str, UpdateRule] = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "sgd": SGD(lr=0.01, weight_decay=0.1),
    "nesterov": SGD(lr=0.01, momentum=0.8, nesterov=True),
    "sgd without momentum": SGD(lr=0.01, momentum=0.0, weight_decay=0.1, decoupled=True),
    "signum": Signum(lr=0.01, weight_decay=0.1),
    "signum without momentum": Signum(lr=0.01, momentum=0.0),
    "clipped sgd": clipped_sgd(0.01, 0.5, 0.8, weight_decay=0.1, nesterov=True),
    "clipped sgd without momentum": clipped_sgd(0.01, 0.5, 0.0, weight_decay=0.1),
    "clipped update of sgd": clipped_sgd(0.01, 0.5, 0.8, weight_decay=0.1, stage="update"),
    "adamw, clipped gradient": CoordinateClip(AdamW(lr=0.01, weight_decay=0.1), 0.5),
    "adamw, clipped update": CoordinateClip(AdamW(lr=0.01, weight_decay=0.1), 0.1, "update"),
    "signum, clipped gradient": CoordinateClip(Signum(lr=0.01), 0.5),
}
"""One of every kind of kernel, and every limit in it; slabs of `make_slab` cross them often."""

FORMS = {
    "fp32 in place": (torch.float32, None, torch.float32, False),
    "bf16 gradient, fp32 weight": (torch.bfloat16, torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32, False),
    "fp32 gradient, bf16 weight": (torch.float32, torch.bfloat16, torch.float32, False),
    "split master": (torch.bfloat16, None, torch.float32, True),
    "bf16 moments": (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    "all 16 bits": (torch.bfloat16, None, torch.bfloat16, True),
}
"""Dtypes of gradient, weight (None: the master is the weight) and moments; split master or not."""

CASES = {
    f"{name}, {form}": (rule, form)
    for name, rule in RULES.items()
    for form in (
        FORMS if name in ("adamw", "nesterov", "clipped sgd") else ("fp32 in place", "all 16 bits")
    )
}
"""Every rule on the widest and the narrowest slabs, one of each kind on all."""

EACH_CASE = pytest.mark.parametrize(("rule", "form"), CASES.values(), ids=CASES)


def make_slab(form: str, rule: UpdateRule, elements: int, seed: int = 0) -> Slab:
    """Return a slab with random contents."""
    gradient, weight, moment, split = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(elements, generator=generator)
    remainder = None
    if split:
        master, remainder = split_master(master)
    return Slab(
        gradient=torch.randn(elements, generator=generator).to(gradient),
        master=master,
        moments=tuple(torch.rand(elements, generator=generator).to(moment) for _ in rule.moments),
        weight=None if weight is None else torch.zeros(elements, dtype=weight),
        remainder=remainder,
    )


def copy_of(slab: Slab, device: str = "cpu") -> Slab:
    """Return a slab with memory of its own."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    return Slab(
        slab.gradient.to(device, copy=True),
        slab.master.to(device, copy=True),
        tuple(moment.to(device, copy=True) for moment in slab.moments),
        copy(slab.weight),
        copy(slab.remainder),
    )


def padded(slab: Slab, device: str = "cpu", margin: int = 40) -> tuple[Slab, Callable[[], bool]]:
    """Return a copy of a slab with poisoned memory on both sides of every tensor, and whether that
    is still as it was.
    """
    around: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        poison = torch.nan if tensor.is_floating_point() else -12345
        memory = torch.full((len(tensor) + 2 * margin,), poison, dtype=tensor.dtype, device=device)
        memory[margin:-margin] = tensor
        around.append((memory, memory.clone()))
        return memory[margin:-margin]

    def intact() -> bool:
        return all(
            torch.equal(now[side].view(torch.uint8), before[side].view(torch.uint8))
            for now, before in around
            for side in (slice(margin), slice(-margin, None))
        )

    parts = [copy(part) for part in (slab.gradient, slab.master, *slab.moments)]
    gradient, master, *moments = (part for part in parts if part is not None)
    copied = Slab(gradient, master, tuple(moments), copy(slab.weight), copy(slab.remainder))
    return copied, intact


def same_bits(one: Slab, other: Slab) -> bool:
    """Whether two slabs hold the same."""
    pairs = [(one.master, other.master), *zip(one.moments, other.moments, strict=True)]
    pairs += [(one.weight, other.weight), (one.remainder, other.remainder)]
    return all(a is None if b is None else torch.equal(a, b.to(a.device)) for a, b in pairs)


def a_step(rule: UpdateRule, number: int = 3) -> Step:
    """Return a step whose scalars all matter."""
    return Step(number, 0.7, rule.hyperparameters(), rounding_seed=1, first_element=2**32 - 100)
