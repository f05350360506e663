"""Block-sparse masks: the same numbers as the dense mask, and work in proportion to the blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_near, derivatives
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from interlace.kernels import attention
from interlace.kernels.attention import slices
from interlace.kernels.attention.block_sparse import read_block_mask
from interlace.kernels.attention.chunked import by_columns, by_rows
from interlace.kernels.attention.options import Options, describe
from interlace.kernels.attention.scoring import HIDDEN, WHOLE, expand_blocks
from interlace.kernels.attention.triton import tuning

LENGTH, BLOCK = 64, 16

Mask = Callable[[Any, Any, Any, Any], Any]


def diagonal_and_first(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Own block, causal inside, and the first block of keys."""
    return ((i // BLOCK == j // BLOCK) & (i >= j)) | (j < BLOCK)


def checkerboard(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Every other block."""
    return (i // BLOCK + j // BLOCK) % 2 == 0


def everything(b: Any, h: Any, i: Any, j: Any) -> Any:
    """All blocks."""
    return i >= 0 * j


MASKS = {
    "diagonal and first": diagonal_and_first,
    "checkerboard": checkerboard,
    "everything": everything,
}


def block_mask(mask: Mask) -> Any:
    return create_block_mask(mask, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)


@pytest.mark.parametrize("name", MASKS)
def test_the_tables_expand_to_the_mask(name: str) -> None:
    made = block_mask(MASKS[name])
    kinds, pairs = read_block_mask(made)
    dense = create_mask(MASKS[name], 1, 1, LENGTH, LENGTH, device="cpu")
    assert torch.equal(expand_blocks(kinds, pairs), dense)
    assert read_block_mask(made)[0] is kinds
    if name != "diagonal and first":
        assert pairs.shape[0] == 0 and set(kinds.unique().tolist()) <= {HIDDEN, WHOLE}


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "chunked") for name in MASKS), ("diagonal and first", "triton")],
)
def test_a_block_mask_equals_its_dense_mask(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(16, 16))
    dense = create_mask(MASKS[name], 1, 1, LENGTH, LENGTH, device="cpu")
    tensors = Case(heads=2, groups=1, queries=LENGTH, keys=LENGTH).tensors()

    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~dense, float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        made = block_mask(MASKS[name])
        return attention(q, k, v, block_mask=made, return_lse=True, order=2, backend=backend)

    assert_near(derivatives(sparse, tensors), derivatives(by_hand, tensors), 1e-7)


def products_of_tiles(mask: Mask, monkeypatch: pytest.MonkeyPatch, *, twice: bool = False) -> int:
    """Return how many matrix products the interpreter computes for one head."""
    from triton.runtime import interpreter

    count = 0
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return dot(*arguments, **options)

    q, k, v = Case(heads=1, groups=1, queries=LENGTH, keys=LENGTH).tensors()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
        out = attention(q, k, v, block_mask=block_mask(mask), order=2, backend="triton")
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=twice)
        if twice:
            torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
    return count


@pytest.mark.parametrize("twice", [False, True])
def test_tiles_of_hidden_blocks_are_not_computed(
    twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(16, 16))
    blocks = {
        name: int((read_block_mask(block_mask(mask))[0] != HIDDEN).sum())
        for name, mask in MASKS.items()
    }
    assert blocks == {"diagonal and first": 7, "checkerboard": 8, "everything": 16}
    names = ["checkerboard", "everything"] if not twice else ["diagonal and first", "checkerboard"]
    products = {name: products_of_tiles(MASKS[name], monkeypatch, twice=twice) for name in names}
    # 2 forward and 7 backward, and for the second order 18, and 7 of backward again.
    each = 9 + 18 + 7 if twice else 9
    assert products == {name: each * blocks[name] for name in names}


def test_the_chunked_back_end_meets_kept_blocks_only() -> None:
    q, k, _ = Case(heads=1, groups=1, queries=LENGTH, keys=LENGTH).tensors()
    for mask in MASKS.values():
        made = block_mask(mask)
        scoring = describe(q, k, Options(block_mask=made))
        met = 0
        for part in slices.slices(by_rows(q, k), by_columns(k), scoring):
            met += part.rows(by_rows(q, k)).shape[3] * part.columns(by_columns(k)).shape[3]
        assert met == BLOCK**2 * int((read_block_mask(made)[0] != HIDDEN).sum())


def test_blocks_that_no_tile_divides_are_left_to_others() -> None:
    q, k, v = Case(heads=1, groups=1, queries=24, keys=24).tensors()
    odd = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, 24, 24, device="cpu", BLOCK_SIZE=8
    )
    with pytest.raises(ValueError, match="multiples of 16, and the blocks of the block mask are"):
        attention(q, k, v, block_mask=odd, backend="triton")
    found = attention(q, k, v, block_mask=odd, order=2)
    torch.testing.assert_close(found, attention(q, k, v, backend="reference"))


def test_a_window_meets_little_more_than_its_keys() -> None:
    q, k, _ = Case(heads=1, groups=1, queries=2048, keys=2048).tensors()
    scoring = describe(q, k, Options(window=256))
    met = 0
    for part in slices.slices(by_rows(q, k), by_columns(k), scoring):
        met += part.rows(by_rows(q, k)).shape[3] * part.columns(by_columns(k)).shape[3]
    assert 2048 * 256 * 0.9 < met < 2048 * 256 * 1.3


def test_what_is_no_block_mask_or_was_made_for_other_sizes_is_named() -> None:
    q, k, v = Case(heads=3, groups=3, queries=LENGTH, keys=LENGTH).tensors()
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.attention.*BlockMask; got Tensor"):
        attention(q, k, v, block_mask=torch.ones(LENGTH, LENGTH))
    with pytest.raises(ValueError, match="is for 64 queries and 64 keys; got 50 and 64"):
        attention(q[:, :, :50], k, v, block_mask=block_mask(checkerboard))
    heads = create_block_mask(checkerboard, None, 2, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)
    with pytest.raises(ValueError, match="is for batch 1 and 2 heads; got 1 and 3"):
        attention(q, k, v, block_mask=heads)


def test_a_mask_read_under_a_transform_serves_later_calls() -> None:
    q, k, v = (x.detach() for x in Case(heads=1, groups=1, queries=64, keys=64).tensors())
    made = block_mask(checkerboard)

    def energy(q: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, block_mask=made, order=2, backend="chunked").square().sum()

    inside = torch.func.grad(energy)(q)
    q.requires_grad_()
    assert torch.equal(torch.autograd.grad(energy(q), q)[0], inside)
