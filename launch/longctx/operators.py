"""Where the time of a pass goes: attention, state mixing, matrix products, or anything else.

Kernels are composed of operations that others use too, so an operation's name does not tell whose
it is. Marks around the blocks do: what runs inside an attention block and outside its
projections and norms is attention (with rotary embedding and cache), and likewise the scan and
convolution of a block that carries a state. Elsewhere matrix products go by their names.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from interlace.trainer.models.layers import Linear, RMSNorm
from interlace.trainer.models.registry import Traits

MARK = "interlace-bench: "
ATTENTION, STATE, PRODUCTS, OTHER = "attention", "ssd and conv", "matrix products", "other"
KINDS = (ATTENTION, STATE, PRODUCTS, OTHER)
PRODUCT_OPERATIONS = {
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "mv", "dot")
}


class Event(Protocol):
    """What is read of an event of torch's profiler."""

    name: str
    cpu_parent: "Event | None"
    self_cpu_time_total: float
    self_device_time_total: float


@contextmanager
def marked(model: nn.Module) -> Generator[None]:
    """Mark the blocks of a model for the profiler."""
    kinds = {module: kind for module in model.modules() if (kind := kind_of(module)) is not None}
    for module, kind in kinds.items():
        # A block calls its mixer's `forward`, so hooks of modules would not see it.
        object.__setattr__(module, "forward", inside(kind, module.forward))
    try:
        yield
    finally:
        for module in kinds:
            object.__delattr__(module, "forward")


def inside(kind: str, forward: Callable[..., object]) -> Callable[..., object]:
    """Return `forward` inside a mark."""

    def marked_forward(*inputs: object, **settings: object) -> object:
        with record_function(MARK + kind):
            return forward(*inputs, **settings)

    return marked_forward


def kind_of(module: nn.Module) -> str | None:
    """Return what a module's own operations count as, or None: as those around it."""
    if isinstance(module, Linear):
        return PRODUCTS
    if isinstance(module, RMSNorm):
        return OTHER
    traits = getattr(module, "traits", None)
    if not isinstance(traits, Traits):
        return None
    return {"keys and values": ATTENTION, "state": STATE}.get(traits.decoding, OTHER)


def shares(profiled: profile) -> dict[str, float]:
    """Return the share of each kind in a profile's time: of the GPU if it was busy, else of the
    CPU.
    """
    spent = {kind: [0.0, 0.0] for kind in KINDS}
    for event in cast(list[Event], list(profiled.events() or [])):
        if event.name.startswith(MARK):
            continue
        found = spent[kind_of_event(event)]
        found[0] += event.self_cpu_time_total
        found[1] += event.self_device_time_total
    device = any(on_device for _, on_device in spent.values())
    times = {kind: both[1] if device else both[0] for kind, both in spent.items()}
    return normalised(times)


def kind_of_event(event: Event) -> str:
    """Return the kind of the nearest mark around an event; a product that no mixer owns is one."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(MARK):
        parent = parent.cpu_parent
    kind = OTHER if parent is None else parent.name.removeprefix(MARK)
    return PRODUCTS if kind == OTHER and event.name in PRODUCT_OPERATIONS else kind


def normalised(times: Mapping[str, float]) -> dict[str, float]:
    """Return times as shares of their sum."""
    total = sum(times.values()) or 1.0
    return {kind: time / total for kind, time in times.items()}


def peak_bytes(profiled: profile) -> int:
    """Return the most that a profile saw allocated at once on the CPU, in bytes, kernels' own
    buffers included.
    """
    results = cast(Any, profiled).profiler.kineto_results
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        now += change
        most = max(most, now)
    return most


def profiling(device: torch.device) -> profile:
    """Return a profiler for one pass; on a CPU it watches memory too."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    return profile(activities=activities, profile_memory=not on_gpu)
