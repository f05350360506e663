"""Head, norms, rotary embedding and gate on a real GPU: near fp64, twice differentiable, and the
same bits every time.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from interlace.kernels import (
    add_rms_norm,
    apply_rotary,
    gated_rms_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_tables,
    swiglu,
)

pytestmark = pytest.mark.gpu
WIDTH, VOCABULARY = 64, 1000
OPERATIONS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, y, weight: rms_norm(x, weight, 1e-5),
    "add_rms_norm": lambda x, y, weight: torch.cat(add_rms_norm(x, y, weight, 1e-5)),
    "gated_rms_norm": lambda x, y, weight: gated_rms_norm(x, y, weight, 1e-5, groups=4),
    "swiglu": lambda x, y, weight: swiglu(x, y),
    "apply_rotary": lambda x, y, weight: apply_rotary(
        x[:, None], *rotary_tables(torch.arange(x.shape[1], device="cuda")[None], WIDTH, 1e4)
    ),
}
EACH = pytest.mark.parametrize("name", OPERATIONS)


def inputs(rows: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(rows, length, width), (rows, length, width), (width,)]
    return [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@EACH
def test_bfloat16_is_near_fp64(name: str, compiled: bool) -> None:
    call = torch.compile(OPERATIONS[name]) if compiled else OPERATIONS[name]
    rough = inputs(4, 128, WIDTH, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in rough]
    found: list[list[torch.Tensor]] = []
    for operation, tensors in ((call, rough), (OPERATIONS[name], exact)):
        out = operation(*tensors)
        gradients = torch.autograd.grad(out.double().square().mean(), tensors, allow_unused=True)
        found.append([out.double(), *(g.double() for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 4e-3


@EACH
def test_two_orders_of_derivatives_are_right(name: str) -> None:
    tensors = inputs(1, 2, WIDTH, torch.float64)
    squared = lambda *given: OPERATIONS[name](*given).square()  # noqa: E731
    assert torch.autograd.gradcheck(squared, tensors)
    assert torch.autograd.gradgradcheck(squared, tensors)


def head(dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, _, _ = inputs(1, tokens, WIDTH, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    # Logits of about 1: those of about 10 differ by their own rounding to bfloat16.
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, device="cuda") / WIDTH**0.5
    # Few words, so that many tokens write to the same row of the head's gradient.
    targets = torch.randint(7, (tokens,), generator=generator, device="cuda")
    return hidden.detach()[0].requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk_bytes", [4 * VOCABULARY * 100, 2**30])
def test_the_head_s_gradients_are_near_fp64_and_repeat_to_the_last_bit(chunk_bytes: int) -> None:
    hidden, weight, targets = head(torch.bfloat16, 3000)
    found: list[tuple[torch.Tensor, ...]] = []
    for _ in range(5):
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=1e-3, chunk_bytes=chunk_bytes)
        gradients = torch.autograd.grad(loss.objective, (hidden, weight))
        found.append((loss.objective.detach(), loss.mean_nll.detach(), *gradients))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight.bfloat16())]
    expected = linear_cross_entropy(*exact, targets, z_loss=1e-3)
    gradients = torch.autograd.grad(expected.objective, exact)
    for one, other in zip(found[0], (*expected, *gradients), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 5e-3


def test_the_head_keeps_no_logits_and_makes_one_chunk_of_them() -> None:
    tokens, rows = 40_000, 1000
    hidden, weight, targets = head(torch.bfloat16, tokens)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=4 * VOCABULARY * rows)
    # bfloat16 and fp32 logits of one chunk, the gradients, and what torch rounds up.
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < rows * VOCABULARY * 6 + 2 * hidden.numel() + 12 * weight.numel() + 4 * 2**20
    kept = torch.cuda.memory_allocated() - before
    assert kept < 2 * hidden.numel() + 4 * weight.numel() + 2 * 2**20
    loss.objective.backward()


def test_the_head_can_be_differentiated_twice() -> None:
    hidden, weight, targets = head(torch.float64, 6)
    weight = weight.detach()[:9].double().requires_grad_()

    def objective(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, z_loss=0.1, chunk_bytes=4 * 9 * 2
        ).objective

    assert torch.autograd.gradgradcheck(objective, (hidden, weight))
