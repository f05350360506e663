"""FlexAttention and flash-attn behind the one call; our operators under compilers, recomputation.

flash-attn needs a GPU: a stand-in with its interface shows how it is called. FlexAttention runs on
a CPU unfused and without gradients.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from attention_cases import CASES, Case, plain
from fake_flash_attn import fake_flash_attn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from interlace.kernels import attention
from interlace.kernels.attention import flash_attn, flex
from interlace.kernels.attention.backends import BACKENDS, nothing
from interlace.kernels.attention.block_sparse import listed
from interlace.kernels.attention.options import Options, describe
from interlace.kernels.attention.request import Request, request_of
from interlace.kernels.attention.scoring import visible
from interlace.kernels.attention.shared import KEPT, made_once

Call = Callable[..., torch.Tensor]

BLOCKWISE = {
    **CASES,
    "a segment around another": Case(
        queries=24, keys=24, options={"segment_ids": torch.tensor([[1] * 8 + [0] * 8 + [0, 1] * 4])}
    ),
    "a document without keys": Case(
        queries=12,
        keys=24,
        options={"cu_seqlens": (torch.tensor([0, 8, 10, 12]), torch.tensor([0, 16, 16, 24]))},
    ),
}
"""With cases that only blocks can get wrong."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def on_a_gpu(case: Case, order: int = 1, needs_grad: bool = True, **changes: Any) -> Request:
    q, k, v = case.tensors()
    request = request_of(q, k, v, Options(**case.options), order)
    wanted = {"device": "cuda", "architecture": "sm90", "dtype": torch.bfloat16, "head_width": 64}
    return replace(request, needs_grad=needs_grad, **{**wanted, **changes})


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, let through on the CPU."""
    module = fake_flash_attn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    allowed = replace(BACKENDS["flash_attn"], obstacle=nothing)
    monkeypatch.setitem(BACKENDS, "flash_attn", allowed)
    return module


def is_for_flash_attn(case: Case) -> bool:
    """Whether the package would serve a case, were it installed here."""
    why_not = BACKENDS["flash_attn"].obstacle(on_a_gpu(case, needs_grad=False))
    return why_not is None or "pip install" in why_not


FOR_FLASH_ATTN = [name for name, case in CASES.items() if is_for_flash_attn(case)]


@pytest.mark.parametrize("name", CASES)
def test_flex_equals_attention_pair_by_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several blocks also in small tensors.
    monkeypatch.setattr(flex, "BLOCK", 16)
    flex.made_of_numbers.cache_clear()
    case = CASES[name]
    tensors = case.tensors()
    with torch.no_grad():
        found = attention(*tensors, backend="flex", return_lse=True, **case.options)
        exact = plain(case, *tensors)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    flex.made_of_numbers.cache_clear()


@pytest.mark.parametrize("version", ["with AuxRequest", "without"])
def test_flex_asks_every_version_of_torch_for_the_log_sum_exp(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.nn.attention.flex_attention as module

    q = torch.randn(1, 2, 8, 16)
    asked: list[set[str]] = []
    real = module.flex_attention

    def note(*inputs: torch.Tensor, **settings: Any) -> Any:
        asked.append(set(settings) & {"return_lse", "return_aux"})
        return real(*inputs, **settings)

    if version == "without":
        monkeypatch.setattr(torch.nn.attention, "flex_attention", SimpleNamespace())
    monkeypatch.setattr(flex, "kernel", lambda device: note)
    out, lse = attention(q, q, q, backend="flex", return_lse=True)
    exact = attention(q, q, q, backend="reference", return_lse=True)
    torch.testing.assert_close((out, lse), exact)
    assert asked == [{"return_aux" if version == "with AuxRequest" else "return_lse"}]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_a_block_mask_is_made_without_all_pairs() -> None:
    length = 8192
    q = torch.empty(1, 1, length, 16)
    ids = torch.arange(length)[None] // 1000
    with Largest() as largest:
        mask = flex.block_mask_of(
            describe(q, q, Options(segment_ids=ids)), length, length, q.device
        )
    assert largest.elements <= 2 * length
    # 64 blocks of 128; a block of queries sees those of its documents, up to its own.
    seen = mask.kv_num_blocks + mask.full_kv_num_blocks
    begins = [max(0, (n * 128) // 1000 * 1000) // 128 for n in range(64)]
    assert seen.flatten().tolist() == [n + 1 - begin for n, begin in enumerate(begins)]
    assert int(mask.full_kv_num_blocks.sum()) > 64


@pytest.mark.parametrize("name", BLOCKWISE)
def test_lists_of_blocks_hold_every_pair_and_whole_ones_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unfused, torch asks for every pair; a GPU trusts the lists.
    monkeypatch.setattr(flex, "BLOCK", 8)
    case = BLOCKWISE[name]
    if "dilation" in case.options:
        return
    q, k, _ = case.tensors()
    scoring = describe(q, k, Options(**case.options))
    pairs = visible(scoring, case.queries, case.keys, q.device)
    if pairs is None:
        assert flex.block_mask_of(scoring, case.queries, case.keys, q.device) is None
        return
    mask = flex.make_block_mask(scoring, case.queries, case.keys, q.device)
    high, wide = mask.BLOCK_SIZE
    rows, columns = mask.kv_indices.shape[-2:]
    padded = torch.zeros(*pairs.shape[:2], rows * high, columns * wide, dtype=torch.bool)
    padded[..., : case.queries, : case.keys] = pairs
    blocks = padded.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).transpose(3, 4)
    some = blocks.flatten(4).any(-1)
    inside = torch.ones(case.queries, case.keys, dtype=torch.bool)
    spare = (0, columns * wide - case.keys, 0, rows * high - case.queries)
    inside = torch.nn.functional.pad(inside, spare).unflatten(1, (columns, wide))
    inside = inside.unflatten(0, (rows, high)).transpose(1, 2).flatten(2)
    every = (blocks.flatten(4) | ~inside).all(-1)
    part = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    assert not (part & whole).any()
    assert ((part | whole) >= some).all()
    assert (whole <= every).all()
    if scoring.query_segments is None and scoring.kinds is None:
        assert torch.equal(part | whole, some.expand_as(part))
        assert torch.equal(whole, (every & some).expand_as(whole))


def test_blocks_that_flex_takes_as_whole_are_those_that_torch_finds() -> None:
    ids = (torch.arange(300) // 70)[None]
    q = torch.empty(1, 1, 300, 16)
    mine = flex.block_mask_of(describe(q, q, Options(segment_ids=ids)), 300, 300, q.device)
    theirs = create_block_mask(
        lambda b, h, i, j: (i >= j) & (ids[0, i] == ids[0, j]), 1, None, 300, 300, device="cpu"
    )
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(mine.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_layers_share_what_is_made_of_a_mask_until_it_changes_or_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    real = flex.make_block_mask
    monkeypatch.setattr(flex, "make_block_mask", lambda *x: made.append(1) or real(*x))
    q = torch.randn(1, 2, 8, 16)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])

    def layer(documents: torch.Tensor, **options: Any) -> torch.Tensor:
        return attention(q, q, q, segment_ids=documents, backend="flex", **options)

    first = layer(ids)
    assert torch.equal(layer(ids), first)
    assert len(made) == 1
    ids[0, 2] = 1
    torch.testing.assert_close(layer(ids), attention(q, q, q, segment_ids=ids, backend="reference"))
    assert len(made) == 2
    layer(ids, window=2)
    assert len(made) == 3
    gone, kept = weakref.ref(ids), len(KEPT)
    del ids
    gc.collect()
    assert gone() is None
    assert len(KEPT) < kept


def test_what_is_made_in_inference_mode_does_not_reach_training() -> None:
    source = torch.zeros(3)
    with torch.inference_mode():
        made_once(source, "key", lambda: torch.ones(3))
    assert not made_once(source, "key", lambda: torch.ones(3)).is_inference()


@pytest.mark.parametrize("name", FOR_FLASH_ATTN)
def test_flash_attn_is_called_so_that_it_equals_attention_pair_by_pair(
    name: str, package: Any
) -> None:
    case = CASES[name]
    tensors = case.tensors()
    with torch.no_grad():
        found = attention(*tensors, backend="flash_attn", return_lse=True, **case.options)
        torch.testing.assert_close(found, plain(case, *tensors), check_dtype=False)
    if "sinks" in case.options:
        return
    out = attention(*tensors, backend="flash_attn", **case.options)
    mine = torch.autograd.grad(out.sin().sum(), tensors)
    theirs = torch.autograd.grad(plain(case, *tensors)[0].sin().sum(), tensors)
    torch.testing.assert_close(mine, theirs)
    function = "flash_attn_varlen_func" if "cu_seqlens" in case.options else "flash_attn_func"
    assert {name for name, _ in package.calls} == {function}


def test_rows_of_a_batch_are_one_row_to_flash_attn(package: Any) -> None:
    options = {"cu_seqlens": torch.tensor([0, 4, 11])}
    case = Case(heads=4, groups=2, batch=3, queries=11, keys=11, options=options)
    tensors = case.tensors()
    with torch.no_grad():
        found = attention(*tensors, backend="flash_attn", return_lse=True, **options)
        torch.testing.assert_close(found, plain(case, *tensors))
    assert len(package.calls) == 1


def test_flash_attn_serves_most_cases() -> None:
    assert {"causal", "grouped", "fewer queries", "window", "documents", "ALiBi", "softcap"} <= set(
        FOR_FLASH_ATTN
    )


def test_flash_attn_is_told_what_it_can_know(package: Any) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    attention(q, k, k, backend="flash_attn")
    attention(q, k, k, backend="flash_attn", window=3, softcap=5.0, scale=0.5)
    attention(q, k, k, backend="flash_attn", cu_seqlens=torch.tensor([0, 2, 6]))
    plainly, bent, documents = (settings for _, settings in package.calls)
    assert plainly["causal"] is True
    assert plainly["window_size"] == (-1, 0)
    assert plainly["deterministic"] is False
    assert (bent["window_size"], bent["softcap"], bent["softmax_scale"]) == ((2, 0), 5.0, 0.5)
    assert documents["cu_seqlens_q"].tolist() == [0, 2, 6, 8, 12]
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, k, k, backend="flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert package.calls[-1][1]["deterministic"] is True


@pytest.mark.parametrize("window", [None, 1, 3, (-1, 2), (0, 2), (2, 0), (0, 0)])
def test_documents_are_found_again_under_every_window(window: Any) -> None:
    starts = torch.tensor([0, 1, 5, 5, 12])
    q = torch.empty(2, 1, 15, 8)
    options = Options(cu_seqlens=starts, window=window, causal=window is None)
    found, longest = flash_attn.boundaries(describe(q, q, options))
    if window in (1, (0, 0)):
        # Every query sees itself only: any documents say the same.
        assert longest == 1
    else:
        assert found.tolist() == [0, 1, 5, 12, 15, 16, 20, 27, 30]
        assert longest == 7


@pytest.mark.parametrize(
    ("backend", "request_", "problem"),
    [
        ("flash_attn", on_a_gpu(CASES["causal"], architecture="sm75"), "needs sm80 or newer"),
        ("flash_attn", on_a_gpu(CASES["causal"], dtype=torch.float32), "takes fp16 and bf16"),
        ("flash_attn", on_a_gpu(CASES["causal"], head_width=260), "up to 256 wide"),
        ("flash_attn", on_a_gpu(CASES["causal"], head_width=20), "in steps of 8"),
        ("flash_attn", on_a_gpu(CASES["segments"]), "takes packed documents as cu_seqlens"),
        ("flash_attn", on_a_gpu(CASES["dilated"]), "takes packed documents as cu_seqlens"),
        ("flash_attn", on_a_gpu(CASES["block sparse"]), "no block-sparse masks"),
        ("flash_attn", on_a_gpu(CASES["more queries"]), "queries that see no key"),
        ("flash_attn", on_a_gpu(CASES["sinks"]), "has no gradient"),
        ("flash_attn", on_a_gpu(CASES["documents"], compiling=True), "inside torch.compile"),
        ("flash_attn", on_a_gpu(CASES["causal"]), "not installed; type  pip install 'flash-attn"),
        ("flash_attn", on_a_gpu(CASES["causal"], order=2), "order 2 is asked"),
        ("flex", on_a_gpu(CASES["causal"], dtype=torch.float64), "take fp32, fp16 and bf16"),
        ("flex", on_a_gpu(CASES["causal"], head_width=8), "16 to 256 wide"),
        ("flex", on_a_gpu(CASES["causal"], compiling=True), "inside torch.compile"),
        ("flex", on_a_gpu(CASES["causal"], device="xpu"), "the tensors are on xpu"),
        ("flex", on_a_gpu(CASES["causal"], device="cpu"), "no backward on a CPU"),
    ],
)
def test_obstacles_are_said(backend: str, request_: Request, problem: str) -> None:
    assert problem in str(BACKENDS[backend].why_not(request_))


@pytest.mark.parametrize(
    ("version", "problem"), [("2.5.9", "the package is 2.5.9; type"), ("2.6.0", None)]
)
def test_flash_attn_is_of_a_version_that_has_everything(
    version: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(version))
    found = flash_attn.missing()
    assert found is None if problem is None else str(found).startswith(problem)


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 0]])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Case(heads=4, groups=2, batch=2, queries=8, keys=8).tensors(dtype)


@pytest.mark.parametrize("options", [{}, {"segment_ids": SEGMENTS}, {"window": 3, "softcap": 2.0}])
def test_compiled_attention_is_one_graph_with_the_gradients_of_eager_code(
    options: dict[str, Any],
) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2.0 * attention(q.sin(), k, v, backend="chunked", **options)

    compiled = cast(Call, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    tensors = inputs()
    for run in (compiled, layer):
        found = run(*tensors)
        gradients = torch.autograd.grad(found.square().sum(), tensors)
        exact = layer(*tensors)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(gradients, torch.autograd.grad(exact.square().sum(), tensors))


def test_a_compiled_choice_is_the_eager_one_and_lengths_stay_open() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(str(graph.graph))
        return graph.forward

    compiled = cast(
        Call, torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend=backend)
    )
    for length in (600, 700, 800, 900, 1000):
        compiled(torch.randn(1, 2, length, 16))
    # The first length, then one graph for all that round up to the same power of two.
    assert len(seen) == 2
    assert all("scaled_dot_product_attention" in text for text in seen)


@pytest.mark.parametrize("options", [{}, {"segment_ids": SEGMENTS, "softcap": 2.0}])
def test_operators_keep_what_they_promise_to_compilers(options: dict[str, Any]) -> None:
    q, k, v = inputs()
    scoring = describe(q, k, Options(**options))
    forward, backward = (
        torch.ops.interlace.attention_forward.default,
        torch.ops.interlace.attention_backward.default,
    )
    torch.library.opcheck(forward, ("chunked", q, k, v, *scoring))
    plain_inputs = [each.detach() for each in (q, k, v)]
    out, lse = forward("chunked", *plain_inputs, *scoring)
    saved = *plain_inputs, out, lse, torch.ones_like(out), None
    torch.library.opcheck(backward, ("chunked", *saved, *scoring))


def test_recomputed_attention_has_the_same_gradients_once_and_twice() -> None:
    tensors = inputs(torch.float64)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q.sin(), k, v, segment_ids=SEGMENTS, order=2, backend="chunked").cos()

    def again(*given: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, checkpoint(block, *given, use_reentrant=False))

    def both_orders(call: Call) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(call(*tensors).square().sum(), tensors, create_graph=True)
        slope = sum((each.square().sum() for each in first), first[0].new_zeros(()))
        return (*first, *torch.autograd.grad(slope, tensors))

    torch.testing.assert_close(both_orders(again), both_orders(block))
