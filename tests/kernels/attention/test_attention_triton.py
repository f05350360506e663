"""The Triton kernels under hard conditions, in the interpreter: poisoned padding, other orders of
programs, strides of every kind, odd head widths, 16-bit floats.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, assert_near, derivatives

from interlace.kernels import attention
from interlace.kernels.attention.triton import tuning

triton_interpreter = pytest.importorskip("triton.runtime.interpreter")

HARD = ("ALiBi in documents", "block sparse per head")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(32, 16))


def call(case: Case, *tensors: torch.Tensor, backend: str = "triton") -> Any:
    return attention(*tensors, **case.options, return_lse=True, order=2, backend=backend)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor whose memory is surrounded and interspersed with NaN."""
    batch, heads, length, width = x.shape
    room = torch.full((batch + 2, length + 40, heads + 2, width + 13), float("nan"), dtype=x.dtype)
    view = room[1:-1, 7 : 7 + length, 1:-1, 5 : 5 + width].transpose(1, 2)
    view.copy_(x)
    return view.detach().requires_grad_()


@pytest.mark.parametrize("name", HARD)
def test_what_lies_beside_the_tensors_is_never_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    tensors = tuple(x.detach().requires_grad_() for x in case.tensors(torch.float32))
    clean = derivatives(lambda *x: call(case, *x), tensors)
    # What a masked load does not load is undefined on a GPU, and 0 in the interpreter unless told.
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    dirty = derivatives(lambda *x: call(case, *x), tuple(poisoned(x) for x in tensors))
    for key, value in clean.items():
        assert torch.equal(dirty[key], value), key


class Shuffled:
    """Runs the programs of a grid in random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def order(self, count: int) -> Iterator[int]:
        numbers = list(range(count))
        self.random.shuffle(numbers)
        return iter(numbers)


@pytest.mark.parametrize("name", HARD)
def test_programs_may_run_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    in_order = derivatives(lambda *x: call(case, *x), tensors)
    builder = triton_interpreter.interpreter_builder
    set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
    orders: dict[int, list[int]] = {}

    def set_sizes(*sizes: int) -> None:
        orders.clear()
        for axis, size in enumerate(sizes):
            orders[axis] = list(Shuffled(size + axis).order(size))
        set_size(*sizes)

    def set_shuffled(*index: int) -> None:
        set_index(*(orders[axis][place] for axis, place in enumerate(index)))

    monkeypatch.setattr(builder, "set_grid_dim", set_sizes)
    monkeypatch.setattr(builder, "set_grid_idx", set_shuffled)
    shuffled = derivatives(lambda *x: call(case, *x), tensors)
    assert any(order != sorted(order) for order in orders.values())
    for key, value in in_order.items():
        assert torch.equal(shuffled[key], value), key


@pytest.mark.parametrize("width", [40, 256])
def test_heads_of_other_widths(width: int) -> None:
    case = Case(heads=1, groups=1, queries=18, keys=18, width=width)
    exact = derivatives(lambda *x: call(case, *x, backend="reference"), case.tensors())
    found = derivatives(lambda *x: call(case, *x), case.tensors(torch.float32))
    assert_near(found, exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "fewer queries"])
def test_16_bit_floats_round_about_as_well_as_they_can(name: str, dtype: torch.dtype) -> None:
    """Against fp64 on the same rounded inputs; the kernels round tiles as a GPU does."""
    case = CASES[name]
    given = tuple(x.detach().requires_grad_() for x in case.tensors(dtype))
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    exact = derivatives(lambda *x: call(case, *x, backend="reference"), wide)
    found = derivatives(lambda *x: call(case, *x), given)
    # Directions are drawn in fp64 and rounded; what that alone changes is part of the comparison.
    assert_near(found, exact, 8 * torch.finfo(dtype).eps)


def test_a_head_that_is_too_wide_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match="heads up to 256 wide, these are 257"):
        attention(q, q, q, backend="triton")
