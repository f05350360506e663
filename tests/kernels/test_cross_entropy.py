"""How much of the logits exists at once, forward and backward; and what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
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


def test_a_batch_that_fits_one_chunk_is_computed_once() -> None:
    hidden, weight, targets = inputs(ROWS)
    with Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=CHUNK_BYTES).objective
    assert largest.elements == ROWS * VOCABULARY
    products: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            products.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    with Products():
        loss.backward()
    # The gradients of hidden and weight; a recomputed chunk would need a third product.
    assert products.count("mm") == 2


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
