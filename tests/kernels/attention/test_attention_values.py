"""Every back end against attention spelled out pair by pair: values and derivatives to order 2."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, assert_near, derivatives, plain

from interlace.kernels import attention
from interlace.kernels.attention import slices
from interlace.kernels.attention.triton import tuning

SECOND_ORDER = ("reference", "chunked", "triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and slices also in small tensors, wider than high so that mix-ups show."""
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(16, 32))
    monkeypatch.setattr(slices, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(slices, "LEAST_QUERIES", 7)


def check(case: Case, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = case.tensors()
    if "sinks" in case.options:
        sinks = case.options["sinks"].clone().requires_grad_()
        tensors = (*tensors, sinks)
    exact = derivatives(lambda *x: plain(with_sinks(case, x), *x[:3]), tensors)
    given = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    found = derivatives(
        lambda *x: attention(
            *x[:3], **with_sinks(case, x).options, return_lse=True, order=2, backend=backend
        ),
        given,
    )
    assert_near(found, exact, tolerance)


def with_sinks(case: Case, tensors: tuple[torch.Tensor, ...]) -> Case:
    if len(tensors) == 3:
        return case
    return replace(case, options=case.options | {"sinks": tensors[3]})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_every_option_is_what_it_says_up_to_second_derivatives(name: str, backend: str) -> None:
    check(CASES[name], backend, torch.float64, 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_so_it_is_for_the_triton_kernels(name: str) -> None:
    # Their scalars are fp32, scale and soft cap among them.
    check(CASES[name], "triton", torch.float64, 2e-7)


IN_FP32 = (
    "causal",
    "full",
    "grouped",
    "window",
    "fewer queries",
    "more queries",
    "segments",
    "segments that come back",
    "documents",
    "ALiBi in documents",
    "softcap",
    "sinks",
    "dilated window",
    "block sparse per head",
    "narrow heads",
)


@pytest.mark.parametrize("backend", SECOND_ORDER)
@pytest.mark.parametrize("name", IN_FP32)
def test_fp32_agrees_with_fp64(name: str, backend: str) -> None:
    check(CASES[name], backend, torch.float32, 1e-5)
