"""How often each kernel can be differentiated; where it cannot, it says so and loses nothing."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_flash_attn import fake_flash_attn
from torch.nn import functional

import interlace.kernels
from interlace.kernels import (
    apply_rotary,
    attention,
    linear_cross_entropy,
    rms_norm,
    rotary_tables,
)
from interlace.kernels.attention import flash_attn, flex
from interlace.kernels.attention.backends import BACKENDS, nothing
from interlace.kernels.attention.flash_attn import settings_of
from interlace.kernels.attention.reference import attention as reference_attention
from interlace.kernels.attention.scoring import Scoring

REMEDY = r"call attention\(\.\.\., order=2\)"


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_attention_is_the_function_and_its_modules_stay_reachable() -> None:
    assert callable(interlace.kernels.attention)
    assert callable(reference_attention)
    assert importlib.import_module("interlace.kernels.attention.api").attention is attention


@pytest.mark.parametrize("documents", [True, False])
def test_the_reference_has_a_third_derivative(documents: bool) -> None:
    q, k, v = leaf(1, 2, 3, 4), leaf(1, 1, 3, 4, seed=1), leaf(1, 1, 3, 4, seed=2)
    segments = torch.tensor([[0, 0, 1]]) if documents else None

    def gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v, segment_ids=segments, backend="reference")
        return torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (q, k, v))


def test_rms_norm_can_be_differentiated_twice() -> None:
    call = lambda x, weight: rms_norm(x, weight, 1e-5)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (leaf(3, 5), leaf(5, seed=1)))


def test_rotary_can_be_differentiated_twice() -> None:
    tables = rotary_tables(torch.arange(3)[None], 4, 100.0)
    assert torch.autograd.gradgradcheck(
        lambda x: apply_rotary(x, *tables).square(), (leaf(1, 2, 3, 4),)
    )


@pytest.mark.parametrize("chunk_bytes", [2**20, 4 * 7 * 2])
def test_cross_entropy_can_be_differentiated_twice_also_in_chunks(chunk_bytes: int) -> None:
    targets = torch.tensor([0, 3, 6, 6, 1])

    def objective(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden, weight, targets, z_loss=0.1, chunk_bytes=chunk_bytes
        ).objective

    assert torch.autograd.gradgradcheck(objective, (leaf(5, 4), leaf(7, 4, seed=1)))


def grads(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Differentiate once, to be differentiated again, and make a number of it."""
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return torch.stack([each.square().sum() for each in first]).sum()


def let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a back end that needs a GPU or a package run here, around a stand-in for its kernel."""
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], obstacle=nothing))
    if name == "flash_attn":
        monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    if name == "flex":
        package = fake_flash_attn()

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> object:
            settings = settings_of(Scoring(0.5, 99, 0), 4, 4)
            inputs = (each.transpose(1, 2) for each in (q, k, v))
            out, lse, _ = package.flash_attn_func(*inputs, **settings)
            return out.transpose(1, 2), SimpleNamespace(lse=lse)

        monkeypatch.setattr(flex, "kernel", lambda device: kernel)


@pytest.mark.parametrize("name", [b.name for b in BACKENDS.values() if b.order == 1])
def test_a_back_end_of_order_1_raises_at_the_second_and_names_the_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_through(name, monkeypatch)
    q, k, v = (leaf(1, 2, 4, 4, seed=n) for n in range(3))
    for wanted in (q, k, v):
        with pytest.raises(RuntimeError, match=REMEDY) as caught:
            grads(attention(q, k, v, backend=name), (wanted,))
        assert f"the {name} back end has only the first" in str(caught.value)
    exact = torch.autograd.grad(attention(q, k, v, backend="reference").sum(), (q, k, v))
    once = torch.autograd.grad(attention(q, k, v, backend=name).sum(), (q, k, v))
    torch.testing.assert_close(once, exact)


def test_without_the_guard_the_second_derivative_would_be_lost_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_through("flash_attn", monkeypatch)
    monkeypatch.setattr(flash_attn, "first_order_only", lambda out, name: out)
    q = leaf(1, 2, 4, 4)
    out = attention(q, q, q, backend="flash_attn")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert not first.requires_grad


@pytest.mark.parametrize("name", [b.name for b in BACKENDS.values() if b.order == 2])
def test_a_back_end_of_order_2_has_two_and_raises_at_the_third(name: str) -> None:
    q, k, v = (leaf(1, 1, 4, 4, seed=n) for n in range(3))
    slope = grads(attention(q, k, v, order=2, backend=name), (q, k, v))
    exact = grads(attention(q, k, v, backend="reference"), (q, k, v))
    torch.testing.assert_close(slope, exact, rtol=1e-4, atol=1e-4)
    second = torch.autograd.grad(slope, (q, k, v), create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(exact, (q, k, v)), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match=r"a third derivative was asked.*backend=\"chunked\""):
        torch.stack([each.sum() for each in second]).sum().backward()


@pytest.mark.parametrize("name", [b.name for b in BACKENDS.values() if b.order == "any"])
def test_a_back_end_of_any_order_has_the_third(name: str) -> None:
    q, k, v = (leaf(1, 1, 3, 2, seed=n) for n in range(3))

    def slope(*inputs: torch.Tensor) -> torch.Tensor:
        return grads(attention(*inputs, order=3, backend=name), inputs)

    assert torch.autograd.gradgradcheck(slope, (q, k, v))


def test_an_order_that_a_back_end_lacks_is_refused_at_the_call() -> None:
    q = leaf(1, 2, 4, 4)
    for name, backend in BACKENDS.items():
        if backend.order == "any":
            continue
        with pytest.raises(ValueError, match=f"it has derivatives up to order {backend.order}"):
            attention(q, q, q, order=backend.order + 1, backend=name)


def test_function_transforms_over_the_fused_back_end_are_refused() -> None:
    q = leaf(1, 2, 4, 4)
    # torch.func always records the backward pass, also where only a first derivative is wanted.
    with pytest.raises(RuntimeError, match=REMEDY):
        torch.func.grad(lambda q: attention(q, q, q).sum())(q.detach())


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_path_of_the_fused_back_end_loses_a_second_derivative(
    documents: bool, groups: int
) -> None:
    q, k = leaf(1, 2, 4, 4), leaf(1, groups, 4, 4, seed=1)
    segments = torch.tensor([[0, 0, 1, 1]]) if documents else None
    for wanted in (q, k):
        with pytest.raises(RuntimeError, match=REMEDY):
            out = attention(q, k, k, segment_ids=segments, backend="sdpa")
            torch.autograd.grad(out.square().sum(), wanted, create_graph=True)


def test_compiled_attention_raises_rather_than_lose_a_second_derivative() -> None:
    q = leaf(1, 2, 4, 4)
    compiled: Callable[..., torch.Tensor] = torch.compile(
        lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q), attention(q, q, q))
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(compiled(q).square().sum(), q, create_graph=True)
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.parametrize(
    ("length", "documents", "masked"),
    [(6, False, False), (1, False, False), (3, False, True), (6, True, True), (1, True, True)],
)
def test_a_mask_is_built_only_where_one_is_needed(
    length: int, documents: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    fused = functional.scaled_dot_product_attention

    def note(*tensors: torch.Tensor, attn_mask: torch.Tensor | None, **options: object) -> object:
        seen.append(attn_mask is not None)
        return fused(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", note)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]]) if documents else None
    attention(leaf(1, 2, length, 4), leaf(1, 2, 6, 4), leaf(1, 2, 6, 4), segment_ids=segments)
    assert seen == [masked]


def test_segments_that_are_no_integers_are_named() -> None:
    q = leaf(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"segment_ids must be integers; got torch\.float32"):
        attention(q, q, q, segment_ids=torch.zeros(1, 4))


def test_a_dtype_without_kernels_is_named() -> None:
    q = torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="one dtype of float64, float32, bfloat16, float16"):
        attention(q, q, q)


def test_chunks_of_cross_entropy_keep_nothing_of_the_size_of_logits() -> None:
    hidden, weight = leaf(64, 8), leaf(1000, 8, seed=1)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (hidden, weight)}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_cross_entropy(
            hidden, weight, torch.zeros(64, dtype=torch.int64), chunk_bytes=4 * 1000 * 8
        )
    # Eight chunks of 8,000 logits were computed; one kept whole would already be above the bound.
    assert sum(tensor.numel() for tensor in kept.values()) < 1000
