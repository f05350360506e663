"""Every kernel against an independent plain twin, in fp64, with gradients and errors."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from interlace.kernels import (
    apply_rotary,
    attention,
    linear_cross_entropy,
    rms_norm,
    rotary_tables,
)
from interlace.kernels.rms_norm import rms_norm_reference

SHAPES = [(4, 4, 9, 9), (4, 2, 9, 9), (6, 1, 9, 9), (4, 2, 3, 9), (2, 2, 1, 9)]


def inputs(
    heads: int, groups: int, length: int, total: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads + 10 * groups + 100 * length)
    sizes = [(2, heads, length, 8), (2, groups, total, 8), (2, groups, total, 8)]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]


def loop_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, segments: torch.Tensor | None
) -> torch.Tensor:
    """One score at a time."""
    batch, heads, length, width = q.shape
    groups, total = k.shape[1], k.shape[2]
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(range(batch), range(heads), range(length)):
        g, place = h // (heads // groups), total - length + t
        seen = [
            s
            for s in range(total)
            if (not causal or s <= place)
            and (segments is None or segments[b, s] == segments[b, place])
        ]
        scores = [float(q[b, h, t] @ k[b, g, s]) / math.sqrt(width) for s in seen]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, h, t] += v[b, g, s] * weight / sum(weights)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_equals_a_plain_loop(
    shape: tuple[int, int, int, int], causal: bool, documents: bool, backend: str
) -> None:
    q, k, v = inputs(*shape)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9]) if documents else None
    out = attention(q, k, v, causal=causal, segment_ids=segments, backend=backend)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = loop_attention(q, k, v, causal, segments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_back_ends_have_the_same_gradients(shape: tuple[int, int, int, int]) -> None:
    gradients = []
    for backend in ("reference", "sdpa"):
        tensors = inputs(*shape)
        out = attention(*tensors, backend=backend)  # type: ignore[arg-type]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad((out * weights).sum(), tensors))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_reference_can_be_differentiated_twice() -> None:
    q, k, v = inputs(2, 1, 4, 4)
    call = lambda q, k, v: attention(q, k, v, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_a_fused_back_end_refuses_a_second_derivative() -> None:
    q, k, v = inputs(2, 2, 4, 4)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    assert str(caught.value) == (
        "attention: a second derivative was asked for (create_graph=True), but the sdpa back end "
        "has only the first; call attention(..., order=2), or name one that has more: "
        'backend="chunked"'
    )


def test_wrong_inputs_of_attention_are_named() -> None:
    q, k, v = inputs(4, 2, 5, 5)
    wrong = [
        ((q[0], k, v), {}, "attention takes q"),
        ((q, k, v[:, :, :4]), {}, "do not agree"),
        ((q, k[:, :1], v), {}, "do not agree"),
        ((q[:, :3], k, v), {}, "query heads|heads"),
        ((q.float(), k, v), {}, "dtype"),
        ((q, k, v), {"segment_ids": torch.zeros(2, 4)}, "segment_ids"),
        ((q, k, v), {"backend": "magic"}, "backend='magic'"),
    ]
    for tensors, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            attention(*tensors, **options)


def test_rms_norm_equals_its_formula() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


def test_rms_norm_of_small_types_is_computed_in_fp32() -> None:
    x = torch.randn(4, 512).to(torch.bfloat16) * 100
    weight = torch.ones(512)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=4e-3, atol=4e-3)


def test_rotary_equals_multiplication_by_complex_numbers() -> None:
    x = torch.randn(2, 3, 7, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]])
    turned = apply_rotary(x, *rotary_tables(positions, 8, 10_000.0))
    numbers = torch.complex(x[..., :4].double(), x[..., 4:].double())
    for pair in range(4):
        angle = positions.double() * 10_000.0 ** (-2 * pair / 8)
        numbers[..., pair] *= torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat([numbers.real, numbers.imag], -1).float()
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 3, 2**20])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_cross_entropy_equals_the_plain_one(chunk_bytes: int, z_loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (17,), generator=generator)
    loss = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk_bytes=chunk_bytes)
    logits = hidden @ weight.T
    plain = functional.cross_entropy(logits, targets)
    objective = plain + z_loss * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss.mean_nll, plain)
    torch.testing.assert_close(loss.objective, objective)
    ours = torch.autograd.grad(loss.objective, (hidden, weight))
    for one, other in zip(ours, torch.autograd.grad(objective, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_of_a_whole_batch_are_never_kept() -> None:
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_cross_entropy(
            hidden, weight, torch.zeros(64, dtype=torch.int64), chunk_bytes=4 * 1000 * 8
        )
    assert max(kept) <= 8000


def test_wrong_shapes_of_cross_entropy_are_named() -> None:
    with pytest.raises(ValueError, match=r"linear_cross_entropy takes hidden \(N, D\)"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3))
