"""Every input that attention refuses, with its exact message; and how its queries are placed."""

from typing import Any

import pytest
import torch

from interlace.kernels import attention
from interlace.kernels.attention.backends import BACKENDS
from interlace.kernels.attention.options import DTYPES


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K = zeros(2, 4, 3, 8), zeros(2, 2, 5, 8)

WRONG_TENSORS = {
    "three dimensions": (
        (zeros(4, 3, 8), K, K),
        "attention takes q (B, H, T, K), k and v (B, G, S, K); "
        "got q [4, 3, 8], k [2, 2, 5, 8], v [2, 2, 5, 8]",
    ),
    "values of another length": (
        (Q, K, zeros(2, 2, 4, 8)),
        "attention: batch, length or head width do not agree: "
        "q [2, 4, 3, 8], k [2, 2, 5, 8], v [2, 2, 4, 8]",
    ),
    "another batch": (
        (zeros(1, 4, 3, 8), K, K),
        "attention: batch, length or head width do not agree: "
        "q [1, 4, 3, 8], k [2, 2, 5, 8], v [2, 2, 5, 8]",
    ),
    "another head width": (
        (zeros(2, 4, 3, 6), K, K),
        "attention: batch, length or head width do not agree: "
        "q [2, 4, 3, 6], k [2, 2, 5, 8], v [2, 2, 5, 8]",
    ),
    "heads that do not divide": (
        (zeros(2, 3, 3, 8), K, K),
        "attention: query heads must be a multiple of key heads: "
        "q [2, 3, 3, 8], k [2, 2, 5, 8], v [2, 2, 5, 8]",
    ),
    "no key heads": (
        (Q, zeros(2, 0, 5, 8), zeros(2, 0, 5, 8)),
        "attention: query heads must be a multiple of key heads: "
        "q [2, 4, 3, 8], k [2, 0, 5, 8], v [2, 0, 5, 8]",
    ),
    "no queries": (
        (zeros(2, 4, 0, 8), K, K),
        "attention: there is nothing to attend to: q [2, 4, 0, 8], k [2, 2, 5, 8], v [2, 2, 5, 8]",
    ),
    "mixed dtypes": (
        (Q.double(), K, K),
        "attention: one dtype of float64, float32, bfloat16, float16 is needed; "
        "got torch.float64, torch.float32, torch.float32",
    ),
    "an integer dtype": (
        (Q.int(), K.int(), K.int()),
        "attention: one dtype of float64, float32, bfloat16, float16 is needed; "
        "got torch.int32, torch.int32, torch.int32",
    ),
    "two devices": (
        (Q, zeros(2, 2, 5, 8, device="meta"), K),
        "attention: one device is needed; got cpu, meta, cpu",
    ),
}

WRONG_SEGMENTS = {
    "the queries' length": (
        zeros(2, 3, dtype=torch.int64),
        "attention: segment_ids must have shape [2, 5]; got [2, 3]",
    ),
    "floats": (zeros(2, 5), "attention: segment_ids must be integers; got torch.float32"),
    "another device": (
        zeros(2, 5, dtype=torch.int64, device="meta"),
        "attention: segment_ids are on meta, keys on cpu",
    ),
}


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_do_not_agree_are_named(name: str, backend: str) -> None:
    tensors, message = WRONG_TENSORS[name]
    with pytest.raises(ValueError) as caught:
        attention(*tensors, backend=backend)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", WRONG_SEGMENTS)
def test_segments_that_do_not_fit_are_named(name: str, backend: str) -> None:
    segments, message = WRONG_SEGMENTS[name]
    with pytest.raises(ValueError) as caught:
        attention(Q, K, K, segment_ids=segments, backend=backend)  # type: ignore[arg-type]
    assert str(caught.value) == message


WRONG_OPTIONS = {
    "order": (0, "attention: order=0: must be a whole number, at least 1"),
    "window": (
        0,
        "attention: window=0: give the number of keys a query sees up to its own, at least 1, or a "
        "pair (keys before, keys after), each at least 0, or -1 for all",
    ),
    "softcap": (-1.0, "attention: softcap=-1.0: must be a positive number, or None for no cap"),
    "scale": ("x", "attention: scale='x': must be a number"),
    "dilation": (0, "attention: dilation=0: must be a whole number, at least 1"),
    "cu_seqlens": ([0, 5], "attention: cu_seqlens must be a tensor; got list"),
    "segment_ids": (
        (torch.zeros(1),) * 3,
        "attention: segment_ids must be a tensor or a pair of them; got 3 values",
    ),
    "sinks": (
        torch.zeros(3),
        "attention: sinks must be one float per query head, (4,); got [3] of torch.float32",
    ),
    "alibi_slopes": (
        torch.zeros(4, requires_grad=True),
        "attention: alibi_slopes are constants; pass alibi_slopes.detach()",
    ),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_that_make_no_sense_are_named(name: str) -> None:
    value, message = WRONG_OPTIONS[name]
    with pytest.raises(ValueError) as caught:
        attention(Q, K, K, **{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_boundaries_that_do_not_rise_are_named() -> None:
    wrong = torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"must rise from 0 to at most the length 3; got \[0, 6\]"):
        attention(Q, K[:, :, :3], K[:, :, :3], cu_seqlens=wrong)
    with pytest.raises(ValueError, match="for 3 queries and 5 keys must be a pair"):
        attention(Q, K, K, cu_seqlens=wrong)


def test_an_unknown_back_end_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        attention(Q, K, K, backend="flash")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "attention: backend='flash': must be one of auto, " + ", ".join(BACKENDS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_every_dtype_stays_what_it_was_and_near_fp64(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)]
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    out = attention(*tensors, backend=backend)  # type: ignore[arg-type]
    exact = attention(*(tensor.double() for tensor in tensors), backend="reference")
    assert out.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_scale_multiplies_the_scores(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    scaled = attention(q, k, v, scale=1.5, backend=backend)  # type: ignore[arg-type]
    by_hand = attention(3.0 * q, k, v, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled, by_hand)
    assert not torch.allclose(scaled, attention(q, k, v))


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_short_queries_are_the_last_rows_of_the_whole(backend: str, documents: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4, generator=generator) for _ in range(3))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]) if documents else None
    whole = attention(q, k, v, segment_ids=segments)
    for length in (1, 2, 6):
        part = attention(q[:, :, -length:], k, v, segment_ids=segments, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(part, whole[:, :, -length:])


@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens": torch.tensor([0, 2, 5])},
        {"segment_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)},
        {"dilation": 2, "alibi_slopes": torch.ones(2)},
        {"sinks": torch.zeros(2), "window": 3},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_compiler_traces_over_every_mask(options: dict[str, Any]) -> None:
    def call(k: torch.Tensor) -> torch.Tensor:
        return attention(k, k, k, **options, backend="chunked")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    k = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, exact = compiled(k), call(k)
    assert torch.equal(found, exact)
    gradients = [torch.autograd.grad(x.square().sum(), k)[0] for x in (found, exact)]
    torch.testing.assert_close(*gradients)
