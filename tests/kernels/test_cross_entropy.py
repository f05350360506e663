"""How much of the logits exists at once, forward and backward; and what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interlace.kernels import linear_cross_entropy
from interlace.kernels.cross_entropy import tokens_per_chunk

TOKENS, WIDTH, VOCABULARY, ROWS = 64, 4, 500, 8
CHUNK_BYTES = 4 * VOCABULARY * ROWS


class Largest(TorchDispatchMode):
    """Notes the largest result of any operation, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 3])
def test_nothing_larger_than_a_chunk_of_logits_is_ever_made(tokens: int, z_loss: float) -> None:
    with Largest() as largest:
        linear_cross_entropy(
            *inputs(tokens), z_loss=z_loss, chunk_bytes=CHUNK_BYTES
        ).objective.backward()
    assert largest.elements == ROWS * VOCABULARY


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_chunk_takes_three_products_and_backward_none(chunks: int) -> None:
    with Products() as products:
        loss = linear_cross_entropy(*inputs(chunks * ROWS), chunk_bytes=CHUNK_BYTES).objective
    assert products.count == 3 * chunks
    with Products() as products:
        loss.backward()
    assert products.count == 0


def test_without_gradients_a_chunk_takes_one_product() -> None:
    with torch.no_grad(), Products() as products:
        loss = linear_cross_entropy(*inputs(), chunk_bytes=CHUNK_BYTES)
    assert products.count == TOKENS // ROWS
    torch.testing.assert_close(tuple(loss), tuple(linear_cross_entropy(*inputs())))


def double_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, targets = inputs()
    return (
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        targets,
    )


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.T
    nll = functional.cross_entropy(logits, targets)
    return nll + z_loss * logits.logsumexp(-1).square().mean(), nll


def combinations_of(objective: torch.Tensor, nll: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "scaled": 0.3 * objective,
        "of the likelihood alone": nll,
        "of both": 2.0 * objective - nll,
        "not linear": objective.square(),
    }


@pytest.mark.parametrize("what", combinations_of(torch.ones(()), torch.ones(())))
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 2**30])
def test_gradients_of_whatever_is_made_of_the_loss_are_exact(what: str, chunk_bytes: int) -> None:
    hidden, weight, targets = double_inputs()
    loss = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk_bytes=chunk_bytes)
    ours = torch.autograd.grad(combinations_of(*loss)[what], (hidden, weight))
    expected = plain(hidden, weight, targets, 0.1)
    theirs = torch.autograd.grad(combinations_of(*expected)[what], (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_second_backward_pass_finds_the_same_gradients() -> None:
    hidden, weight, targets = double_inputs()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=CHUNK_BYTES).objective
    first = torch.autograd.grad(0.5 * loss, (hidden, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2.0 * loss, (hidden, weight))
    for one, two, was in zip(first, second, kept, strict=True):
        torch.testing.assert_close(two, 4.0 * one)
        assert torch.equal(one, was)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int, order: int) -> None:
    tensors, (hidden, weight, targets) = double_inputs(), double_inputs()
    trained = 1 - frozen
    loss = linear_cross_entropy(
        *(t.detach() if n == frozen else t for n, t in enumerate(tensors)), chunk_bytes=CHUNK_BYTES
    ).objective
    expected, _ = plain(hidden, weight, targets, 0.0)
    further = order == 2
    (ours,) = torch.autograd.grad(loss, tensors[trained], create_graph=further)
    (theirs,) = torch.autograd.grad(expected, (hidden, weight)[trained], create_graph=further)
    if further:
        (ours,) = torch.autograd.grad(ours.square().sum(), tensors[trained])
        (theirs,) = torch.autograd.grad(theirs.square().sum(), (hidden, weight)[trained])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_a_compiled_loss_keeps_its_derivatives(order: int) -> None:
    tensors, targets = double_inputs()[:2], double_inputs()[2]

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, chunk_bytes=CHUNK_BYTES).objective

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return plain(hidden, weight, targets, 0.0)[0]

    found: list[tuple[torch.Tensor, ...]] = []
    for call in (torch.compile(ours, backend="aot_eager"), theirs):
        loss = call(*tensors)
        gradients = torch.autograd.grad(loss.square(), tensors, create_graph=order == 2)
        if order == 2:
            gradients = torch.autograd.grad(gradients[0].square().sum(), tensors)
        found.append(gradients)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_the_head_s_gradient_is_summed_over_chunks_in_fp32() -> None:
    hidden, weight, targets = inputs(2000)
    rough, exact = hidden.detach().bfloat16(), hidden.detach().bfloat16().double()
    heads = [weight.detach().bfloat16().requires_grad_() for _ in range(2)]
    linear_cross_entropy(rough, heads[0], targets, chunk_bytes=CHUNK_BYTES).objective.backward()
    linear_cross_entropy(exact, heads[1], targets, chunk_bytes=CHUNK_BYTES).objective.backward()
    ours, theirs = (head.grad for head in heads)
    assert ours is not None and theirs is not None
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    # 250 sums in bfloat16 would be off by 1e-2.
    assert error < 4e-3


@pytest.mark.parametrize("chunk_bytes", [1, CHUNK_BYTES, 2**30])
def test_bfloat16_hidden_states_give_an_fp32_loss(chunk_bytes: int) -> None:
    hidden, weight, targets = inputs()
    rough = linear_cross_entropy(hidden.bfloat16(), weight, targets, chunk_bytes=chunk_bytes)
    exact = linear_cross_entropy(hidden.double(), weight, targets)
    assert rough.objective.dtype == rough.mean_nll.dtype == torch.float32
    assert exact.mean_nll.dtype == torch.float64
    torch.testing.assert_close(rough.mean_nll.double(), exact.mean_nll, rtol=1e-2, atol=1e-2)


def test_a_chunk_has_as_many_tokens_as_fit_and_at_least_one() -> None:
    assert tokens_per_chunk(VOCABULARY, CHUNK_BYTES) == ROWS
    assert tokens_per_chunk(VOCABULARY, CHUNK_BYTES - 1) == ROWS - 1
    assert tokens_per_chunk(VOCABULARY, 1) == 1


@pytest.mark.parametrize(
    ("shapes", "written"),
    [
        (((2, 3), (5, 4), (2,)), "[2, 3], [5, 4] and [2]"),
        (((2, 3), (5, 3), (3,)), "[2, 3], [5, 3] and [3]"),
        (((1, 2, 3), (5, 3), (2,)), "[1, 2, 3], [5, 3] and [2]"),
        (((0, 3), (5, 3), (0,)), "[0, 3], [5, 3] and [0]"),
    ],
)
def test_shapes_that_do_not_agree_are_named(
    shapes: tuple[tuple[int, ...], ...], written: str
) -> None:
    hidden, weight, targets = shapes
    with pytest.raises(ValueError) as caught:
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64)
        )
    assert str(caught.value) == (
        "linear_cross_entropy takes hidden (N, D), weight (V, D) and targets (N,), N at least 1; "
        f"got {written}"
    )


@pytest.mark.parametrize(
    ("number", "dtype", "words"),
    [
        (0, torch.int32, "hidden must be floating; got torch.int32"),
        (1, torch.int64, "weight must be floating; got torch.int64"),
        (2, torch.int32, "targets must be int64; got torch.int32"),
    ],
)
def test_a_wrong_dtype_is_named(number: int, dtype: torch.dtype, words: str) -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)]
    tensors[number] = tensors[number].to(dtype)
    with pytest.raises(TypeError) as caught:
        linear_cross_entropy(*tensors)
    assert str(caught.value) == f"linear_cross_entropy: {words}"


def test_tensors_on_several_devices_are_named() -> None:
    with pytest.raises(ValueError) as caught:
        linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), torch.zeros(2, dtype=torch.int64)
        )
    assert str(caught.value) == (
        "linear_cross_entropy: hidden, weight and targets must be on one device; got cpu, meta and "
        "cpu"
    )
