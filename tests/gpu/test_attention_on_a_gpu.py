"""The Triton back end of attention on a real GPU: every derivative near fp64, the same bits every
time, memory that grows with the length, and no second derivative lost by anyone.

Kernels are compiled by several processes before the first test, since that takes most of the time.
Without a GPU the same tests run in Triton's interpreter, on shorter sequences:

    TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_attention_on_a_gpu.py
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import Case, documents
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from interlace.kernels import attention
from interlace.kernels.attention.backends import BACKENDS

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTH, BLOCK = (333, 128) if ON_GPU else (66, 32)
"""More than two tiles, and a block of the sparse mask."""
BATCH, HEADS = (2, 4) if ON_GPU else (1, 2)
PROCESSES = 8

Tensors = dict[str, torch.Tensor]


def parts(*shares: float) -> torch.Tensor:
    """Return boundaries of documents at shares of the length."""
    return torch.tensor([0, *(int(share * LENGTH) for share in shares), LENGTH])


def letters(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A mask with hidden, partial and whole blocks, another for every head."""
    return ((i // BLOCK + j // BLOCK + h) % 2 == 0) | ((i >= j) & (j % 3 > 0))


SELF = Case(heads=HEADS, groups=HEADS // 2, batch=BATCH, queries=LENGTH, keys=LENGTH, width=64)
FEATURES = {
    "causal": SELF,
    "full": replace(SELF, groups=HEADS, options={"causal": False}),
    "window": replace(SELF, queries=LENGTH // 2, options={"window": LENGTH // 4}),
    "more queries than keys": replace(SELF, keys=LENGTH // 2),
    "packed": replace(SELF, options={"cu_seqlens": parts(0.3, 0.31, 0.8), "softcap": 2.0}),
    "segments": replace(
        SELF,
        options={
            "segment_ids": torch.tensor([[3, 1, 3, 2, 2]])
            .repeat_interleave(-(-LENGTH // 5), 1)[:, :LENGTH]
            .expand(BATCH, -1),
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])[:HEADS],
            "sinks": torch.tensor([0.3, -1.0, 0.0, 2.0])[:HEADS],
        },
    ),
    "block sparse": replace(
        SELF,
        options={
            "block_mask": create_block_mask(
                letters, 1, HEADS, LENGTH, LENGTH, device=DEVICE, BLOCK_SIZE=BLOCK
            )
        },
    ),
}
CASES = FEATURES | {f"{n} wide": replace(SELF, width=n) for n in (16, 80, 96, 128, 256)}
NARROWER = {"float32": 32}
"""Width of the features' heads; fp32 without tensor cores takes long to compile in wide ones."""
PAIRS = [
    *((name, dtype) for dtype in ("float32", "bfloat16") for name in FEATURES),
    *((name, "bfloat16") for name in CASES if name not in FEATURES),
    ("16 wide", "float32"),
    ("80 wide", "float32"),
    ("causal", "float16"),
]
FLOOR = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
"""Errors relative to the largest number that are never held against a dtype: two of its units in
the last place, and in fp32 what a sum of many cancelling terms costs.
"""


def case_of(name: str, dtype: str) -> Case:
    case = CASES[name]
    return replace(case, width=NARROWER.get(dtype, case.width)) if name in FEATURES else case


def options_of(case: Case) -> dict[str, Any]:
    """Return a case's options on the device, without the sinks, which are an input."""
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    moved.pop("sinks", None)
    return moved


def inputs_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v and the sinks, if any."""
    found = [x.detach().to(DEVICE) for x in case.tensors(dtype)]
    if "sinks" in case.options:
        found.append(case.options["sinks"].to(DEVICE, dtype))
    return found


def like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a tensor of a shape, the same numbers for every dtype that can hold bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype)


def derivatives(case: Case, inputs: list[torch.Tensor], backend: str) -> Tensors:
    """Return output, log-sum-exp, gradients, second derivatives and tangents."""
    options = options_of(case)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor) -> Any:
        given = options | ({"sinks": sinks[0]} if sinks else {})
        return attention(q, k, v, **given, return_lse=True, order=2, backend=backend)

    leaves = [x.detach().requires_grad_() for x in inputs]
    names = ["q", "k", "v", "sinks"][: len(leaves)]
    out, lse = call(*leaves)
    # A query that sees no key has no log-sum-exp to differentiate.
    cotangents = like(out, 1).requires_grad_(), like(lse, 2) * (lse.detach() > float("-inf"))
    along = [like(x, 3 + n) for n, x in enumerate(leaves)]
    first = torch.autograd.grad((out, lse), leaves, cotangents, create_graph=True)
    second = torch.autograd.grad(first, (*leaves, cotangents[0]), along)
    found = {"out": out, "lse": lse}
    found |= {f"gradient of {name}": x for name, x in zip(names, first, strict=True)}
    found |= {f"second of {name}": x for name, x in zip([*names, "cotangent"], second, strict=True)}
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, a) for x, a in zip(inputs, along, strict=True)]
        for name, dual in zip(("out", "lse"), call(*duals), strict=True):
            tangent = forward_ad.unpack_dual(dual).tangent
            assert tangent is not None
            found[f"tangent of {name}"] = tangent
    return {name: x.detach() for name, x in found.items()}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error relative to the largest number; queries without keys must agree."""
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    difference = (found.double() - exact).masked_fill(~finite, 0.0).abs().max()
    return float(difference / exact.masked_fill(~finite, 0.0).abs().max().clamp(min=1e-30))


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead() -> None:
    """Compile on several cores; what fails here fails again, and says why, in its test."""
    if ON_GPU:
        search = os.pathsep.join(filter(None, sys.path))
        shares = [PAIRS[n::PROCESSES] for n in range(PROCESSES)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *(word for pair in share for word in pair)],
                env={**os.environ, "PYTHONPATH": search},
                stderr=subprocess.DEVNULL,
            )
            for share in shares
        ]
        for process in running:
            process.wait()


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=lambda word: word)
def test_every_derivative_is_near_fp64(name: str, dtype: str) -> None:
    case = case_of(name, dtype)
    inputs = inputs_of(case, getattr(torch, dtype))
    exact = derivatives(case, [x.double() for x in inputs], "reference")
    formula = derivatives(case, inputs, "reference")
    found = derivatives(case, inputs, "triton")
    too_far = {
        key: (error(found[key], value), bound)
        for key, value in exact.items()
        if (bound := max(FLOOR[dtype], 2 * error(formula[key], value))) < error(found[key], value)
    }
    assert too_far == {}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("causal", "bfloat16"), ("segments", "bfloat16"), ("block sparse", "float32")],
    ids=lambda word: word,
)
def test_the_same_bits_come_every_time(name: str, dtype: str) -> None:
    case = case_of(name, dtype)
    inputs = inputs_of(case, getattr(torch, dtype))
    first = derivatives(case, inputs, "triton")
    for _ in range(3 if ON_GPU else 1):
        again = derivatives(case, inputs, "triton")
        assert [key for key, x in first.items() if not torch.equal(x, again[key])] == []


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that tensors took at most while something ran."""
    # What earlier calls left behind in cycles must not be freed in between.
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    used = most = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, used)
    return most


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_memory_grows_with_the_length_and_not_with_its_square(name: str) -> None:
    peaks: list[int] = []
    lengths = (4096, 16_384) if ON_GPU else (32, 128)
    for length in lengths:
        case = replace(SELF, queries=length, keys=length, batch=1)
        if name == "packed":
            case = replace(case, options={"cu_seqlens": torch.tensor([0, length // 3, length])})
        inputs = inputs_of(case, torch.bfloat16)
        # Compiled, and tables made, before memory is counted.
        derivatives(case, inputs, "triton")
        peaks.append(peak_bytes(partial(derivatives, case, inputs, "triton")))
    # Four times the length; a square would be sixteen times, and its scores of one head alone more
    # than the second bound. About eleven tensors of the size of the queries are needed at once.
    assert peaks[1] < 4.5 * peaks[0]
    assert peaks[1] < 20 * 2 * inputs[0].numel()


@pytest.mark.parametrize("name", [name for name, each in BACKENDS.items() if each.order == 1])
def test_no_first_order_back_end_loses_a_second_derivative(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs_of(SELF, torch.bfloat16))
    # Where it is not installed, or has no backward here, it must say that instead.
    with pytest.raises((RuntimeError, ValueError), match=r"order=2|cannot serve this call"):
        out = attention(q, k, v, backend=name)
        torch.autograd.grad(out.float().square().sum(), q, create_graph=True)


def test_a_third_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs_of(SELF, torch.bfloat16))
    out = attention(q, k, v, order=2, backend="triton")
    for _ in range(2):
        (out,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a third derivative was asked for"):
        torch.autograd.grad(out.float().square().sum(), q)


@pytest.mark.parametrize("name", ["causal", "segments"])
def test_compiled_without_breaks_it_gives_the_same_bits(name: str) -> None:
    case = case_of(name, "bfloat16")
    options, inputs = options_of(case), inputs_of(case, torch.bfloat16)

    def gradients(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, like(out, 1))]

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor
    ) -> torch.Tensor:
        given = options | ({"sinks": sinks[0]} if sinks else {})
        return attention(q, k, v, **given, backend="triton")

    torch.compiler.reset()
    compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(call), strict=True))


@pytest.mark.parametrize("length", [192, 256])
def test_cudnn_is_not_asked_where_its_masked_backward_is_wrong(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []
    fused = functional.scaled_dot_product_attention

    def note(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*tensors, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", note)
    case = replace(SELF, groups=HEADS, queries=length, keys=length)
    ids = documents(length // 2, length - length // 2).expand(BATCH, -1).to(DEVICE)
    inputs = [x.requires_grad_() for x in inputs_of(case, torch.bfloat16)]

    def gradients(tensors: list[torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
        # Rows whose log-sum-exp is far below zero, as the error needs.
        q, k, v = tensors
        out = attention(q - 30.0, k + 1.0, v, segment_ids=ids, backend=backend)
        return torch.autograd.grad(out.sum(), tensors)

    exact = gradients([x.detach().double().requires_grad_() for x in inputs], "reference")
    for one, other in zip(gradients(inputs, "sdpa"), exact, strict=True):
        assert error(one, other) < 0.1
    assert allowed == [not ON_GPU or length % 128 != 64]


if __name__ == "__main__":
    words = sys.argv[1:]
    for name, dtype in zip(words[::2], words[1::2], strict=True):
        case = case_of(name, dtype)
        derivatives(case, inputs_of(case, getattr(torch, dtype)), "triton")
