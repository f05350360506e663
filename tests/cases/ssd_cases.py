"""Inputs for the tests of the scan and the convolution, and ways to make careless kernels fail."""

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

Tensors = dict[str, torch.Tensor]


def scan_inputs(
    batch: int = 2,
    length: int = 29,
    heads: int = 4,
    width: int = 5,
    groups: int = 2,
    states: int = 6,
    *,
    seed: int = 0,
    extras: bool = True,
) -> Tensors:
    """Return all differentiable inputs of `ssd` in fp64; without extras no D, z, initial states."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": randn(batch, length, heads, width),
        "dt": functional.softplus(randn(batch, length, heads) - 1.0),
        "A": -randn(heads).exp(),
        "B": randn(batch, length, groups, states),
        "C": randn(batch, length, groups, states),
    }
    if extras:
        tensors |= {
            "D": randn(heads, width),
            "z": randn(batch, length, heads, width),
            "initial_states": randn(batch, heads, width, states),
        }
    # Representable in fp32: what is measured is the error of computing, not that of the inputs.
    return {name: tensor.float().double() for name, tensor in tensors.items()}


def with_mixed_steps(tensors: Tensors) -> Tensors:
    """Return inputs with one step of about 10 among seven of about 0.0005."""
    dt = tensors["dt"]
    large = torch.arange(dt.shape[1])[None, :, None] % 8 == 0
    return {**tensors, "dt": (torch.where(large, 20.0, 1e-3) * dt).float().double()}


def documents(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """Return segments: `none`, `long` (documents that begin in the middle of chunks), `short` (many
    of one position, ids that come back).
    """
    if kind == "none":
        return None
    rows = torch.arange(length).expand(batch, -1)
    if kind == "long":
        shift = torch.arange(batch)[:, None] * 5
        return (rows + shift) // 11
    pattern = torch.tensor([3, 3, 0, 3, 7, 7, 7, 0, 0, 0, 0, 0, 2])
    return pattern[(rows + torch.arange(batch)[:, None]) % len(pattern)]


def weighted(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a number whose gradient differs at every element of every output."""
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for n, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(100 + n)
        weight = torch.randn(output.shape, generator=generator)
        # Rounded here, so that no gradient is on its way into a narrow dtype.
        weight = weight.bfloat16().double().to(output.device)
        total = total + (output.double() * weight).sum()
    return total


def values_and_gradients(call: Any, tensors: Mapping[str, torch.Tensor], **options: Any) -> Tensors:
    """Return outputs and gradients of `call(**tensors, **options)`, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(weighted(outputs), list(leaves.values()))
    found = {f"output {n}": output.detach() for n, output in enumerate(outputs)}
    return found | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def largest_error(found: Tensors, exact: Tensors) -> tuple[float, str]:
    """Return the largest error relative to the largest element of its tensor, and where it is."""
    assert found.keys() == exact.keys()
    errors = [
        (
            float((found[name].double() - exact[name]).abs().max() / exact[name].abs().max()),
            name,
        )
        for name in exact
        if exact[name].numel()
    ]
    # max() would pass over NaN.
    return next(((e, name) for e, name in errors if e != e), max(errors))


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of (B, T, ...) with NaN between and around its rows."""
    batch, length = tensor.shape[:2]
    row = tensor[0, 0].numel()
    wide = torch.full((batch * length + 2, row + 3), float("nan"), dtype=tensor.dtype)
    inner = wide[1:-1, :row].unflatten(0, (batch, length)).unflatten(2, tensor.shape[2:])
    return inner.copy_(tensor)


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    was = (
        torch.are_deterministic_algorithms_enabled(),
        (torch.utils.deterministic.fill_uninitialized_memory),
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


@contextmanager
def programs_in_another_order(seed: int) -> Iterator[None]:
    """Let Triton's interpreter run the programs of every kernel in a shuffled order."""
    from triton.runtime.interpreter import interpreter_builder

    kept = type(interpreter_builder).set_grid_dim, type(interpreter_builder).set_grid_idx
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_grid_dim(self: Any, *sizes: int) -> None:
        places = list(itertools.product(*(range(size) for size in sizes)))
        order.clear()
        order.update(zip(places, random.Random(seed).sample(places, len(places)), strict=True))
        kept[0](self, *sizes)

    def set_grid_idx(self: Any, *place: int) -> None:
        kept[1](self, *order[place])

    # The class is patched: Triton compares the methods of the instance with its own.
    type(interpreter_builder).set_grid_dim = set_grid_dim
    type(interpreter_builder).set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        type(interpreter_builder).set_grid_dim, type(interpreter_builder).set_grid_idx = kept
