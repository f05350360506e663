"""The causal convolution: position by position, shifted, in Triton and step by step, with packed
documents and a state.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ssd_cases import (
    Tensors,
    documents,
    empty_is_nan,
    largest_error,
    poisoned,
    programs_in_another_order,
    values_and_gradients,
)
from torch.nn import functional

from interlace.kernels import causal_conv1d, causal_conv1d_step
from interlace.kernels.conv1d.api import ORDERS, choose_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["none", "long", "short"]


def conv_inputs(batch: int = 2, length: int = 23, channels: int = 5, taps: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(taps)
    sizes = {
        "x": (batch, length, channels),
        "weight": (channels, taps),
        "bias": (channels,),
        "initial_states": (batch, taps - 1, channels),
    }
    return {name: torch.randn(size, generator=generator).double() for name, size in sizes.items()}


def test_without_documents_it_is_torch_s_convolution() -> None:
    inputs = conv_inputs()
    inputs.pop("initial_states")
    x, weight, bias = inputs.values()
    padded = functional.pad(x.transpose(1, 2), (3, 0))
    expected = functional.conv1d(padded, weight.unsqueeze(1), bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, weight, bias), expected)
    silu = causal_conv1d(x, weight, bias, activation="silu", backend="reference")
    torch.testing.assert_close(silu, functional.silu(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 23])
def test_shifts_equal_positions_one_by_one(length: int, taps: int, kind: str) -> None:
    inputs, segments = conv_inputs(length=length, taps=taps), documents(kind, 2, length)
    options = {"segment_ids": segments, "return_final_states": True, "activation": "silu"}
    exact = values_and_gradients(causal_conv1d, inputs, backend="reference", **options)
    found = values_and_gradients(causal_conv1d, inputs, backend="shifted", **options)
    if taps > 1:
        assert found["output 1"].shape == (2, taps - 1, 5)
    assert largest_error(found, exact) < (1e-14, "")


@pytest.mark.parametrize("kind", ["none", "short"])
@pytest.mark.parametrize("backend", ["reference", "shifted"])
def test_derivatives_are_those_of_finite_differences_twice(backend: str, kind: str) -> None:
    inputs = {name: t.requires_grad_() for name, t in conv_inputs(1, 5, 2, 3).items()}

    def call(*tensors: torch.Tensor) -> Any:
        return causal_conv1d(
            *tensors[:3],
            initial_states=tensors[3],
            activation="silu",
            segment_ids=documents(kind, 1, 5),
            return_final_states=True,
            backend=backend,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_the_whole(kind: str) -> None:
    inputs, segments = conv_inputs(), documents(kind, 2, 23)
    options: dict[str, Any] = {"activation": "silu"}
    whole, final = causal_conv1d(
        **inputs, **options, segment_ids=segments, return_final_states=True
    )
    state = inputs["initial_states"]
    for t in range(23):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None]
        x = inputs["x"][:, t]
        y, state = causal_conv1d_step(state, x, inputs["weight"], inputs["bias"], **options)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_separate_runs_and_pieces_the_whole() -> None:
    inputs, lengths = conv_inputs(1, 23), [1, 2, 13, 1, 6]
    start = inputs.pop("initial_states")
    numbers = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None]
    packed = causal_conv1d(**inputs, segment_ids=numbers)
    x = inputs.pop("x")
    alone = [causal_conv1d(piece, **inputs) for piece in x.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(alone, 1), packed)

    whole, final = causal_conv1d(x, **inputs, initial_states=start, return_final_states=True)
    pieces: list[torch.Tensor] = []
    for piece in x.split(lengths, dim=1):
        y, start = causal_conv1d(piece, **inputs, initial_states=start, return_final_states=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(start, final)


def through_kernels(
    tensors: Tensors, dtype: torch.dtype, segments: torch.Tensor | None, **options: Any
) -> Tensors:
    given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    given["x"] = poisoned(given["x"])
    given = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    segments = None if segments is None else segments.to(DEVICE)
    with empty_is_nan():
        found = values_and_gradients(
            causal_conv1d, given, segment_ids=segments, backend="triton", **options
        )
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a few positions and channels already need several of."""
    pytest.importorskip("triton")
    from interlace.kernels.conv1d import launch

    monkeypatch.setattr(launch, "ROWS", 8)
    monkeypatch.setattr(launch, "CHANNELS", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("kind", "taps", "activation", "extras"),
    [
        ("none", 4, "none", True),
        ("none", 4, "silu", False),
        ("long", 4, "silu", True),
        ("long", 1, "silu", False),
        ("short", 4, "none", False),
        ("short", 3, "silu", True),
    ],
)
def test_kernels_equal_the_formula(kind: str, taps: int, activation: str, extras: bool) -> None:
    tensors, segments = conv_inputs(taps=taps), documents(kind, 2, 23)
    if not extras:
        tensors = {name: tensors[name] for name in ("x", "weight")}
    found = through_kernels(tensors, torch.float32, segments, activation=activation)
    exact = values_and_gradients(
        causal_conv1d, tensors, segment_ids=segments, activation=activation, backend="reference"
    )
    assert largest_error(found, exact) < (1e-6, "")


@pytest.mark.usefixtures("small_blocks")
def test_rows_shorter_than_the_taps_see_the_state() -> None:
    for length in (1, 2):
        tensors = conv_inputs(3, length)
        found = through_kernels(tensors, torch.float32, None, activation="silu")
        exact = values_and_gradients(causal_conv1d, tensors, activation="silu")
        assert largest_error(found, exact) < (1e-6, "")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_rounded_only_where_they_are_stored(dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype).double() for name, t in conv_inputs(1, 13).items()}
    found = through_kernels(tensors, dtype, None, activation="silu")
    exact = values_and_gradients(causal_conv1d, tensors, activation="silu")
    assert found["output 0"].dtype == found["d x"].dtype == dtype
    assert largest_error(found, exact) < (0.51 * torch.finfo(dtype).eps, "")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's order can be chosen")
def test_the_order_of_programs_changes_no_bit() -> None:
    tensors, segments = conv_inputs(2, 13), documents("long", 2, 13)
    straight = through_kernels(tensors, torch.float32, segments)
    for seed in (1, 2):
        with programs_in_another_order(seed):
            shuffled = through_kernels(tensors, torch.float32, segments)
        assert all(torch.equal(straight[name], shuffled[name]) for name in straight)


def test_a_second_derivative_of_the_kernels_is_refused_with_the_remedy() -> None:
    pytest.importorskip("triton")
    assert ORDERS == {"reference": "any", "shifted": "any", "triton": 1}
    x = torch.randn(1, 3, 2, requires_grad=True)
    y = causal_conv1d(x, torch.ones(2, 2), backend="triton")
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert str(caught.value) == (
        "causal_conv1d: a second derivative was asked for (create_graph=True), but the triton back "
        'end has only the first; call causal_conv1d(..., backend="shifted")'
    )


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    pytest.importorskip("triton")
    from interlace.kernels.conv1d.operator import conv1d_forward

    x, weight, bias, state = (t.float().requires_grad_() for t in conv_inputs(1, 4, 2).values())
    numbers = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)
    torch.library.opcheck(conv1d_forward, (x, weight, bias, numbers, state, True))
    torch.library.opcheck(conv1d_forward, (x, weight, None, None, None, False))


@pytest.mark.parametrize("backend", ["shifted", "triton"])
def test_compilers_trace_over_it(backend: str) -> None:
    pytest.importorskip("triton")
    x, weight, *_ = (tensor.float() for tensor in conv_inputs(1, 5, 2).values())

    def loss(x: torch.Tensor) -> torch.Tensor:
        y = causal_conv1d(x, weight, activation="silu", backend=backend)  # type: ignore[call-overload]
        return y.square().sum()

    gradients: list[torch.Tensor] = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_the_choice_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 1, 2), torch.zeros(2, 4)
    assert choose_backend(x, weight, "auto") == ("shifted", "x is not on a GPU")
    wrong = [
        (x.double(), weight, "x is torch.float64, and the kernels take"),
        (x, torch.zeros(2, 9), "weight has 9 taps, and the kernels take 8 at most"),
    ]
    for first, second, message in wrong:
        with pytest.raises(ValueError, match=message):
            choose_backend(first, second, "triton")
    with pytest.raises(ValueError, match="backend='magic': must be 'auto', 'reference', 'shifted'"):
        choose_backend(x, weight, "magic")  # type: ignore[arg-type]
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "triton", None)
        with pytest.raises(ImportError, match=r"causal_conv1d with .* needs Triton.*pip install"):
            choose_backend(x, weight, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="x is on cpu, and the kernels need a GPU"):
        choose_backend(x, weight, "triton")


X, WEIGHT = torch.zeros(2, 3, 5), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: causal_conv1d(X[0], WEIGHT),
            ValueError,
            "causal_conv1d: x is [3, 5]; it must be (B, T, C), none of them 0",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT.T),
            ValueError,
            "causal_conv1d: weight is [4, 5]; it must be (C, W) with C = 5 as in x, and W at "
            "least 1",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT, torch.zeros(4)),
            ValueError,
            "causal_conv1d: bias is [4]; beside x [2, 3, 5] it must be [5]",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT, initial_states=X),
            None,
            "",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT[:, 1:], initial_states=X),
            ValueError,
            "causal_conv1d: initial_states is [2, 3, 5]; beside x [2, 3, 5] it must be [2, 2, 5]",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT.bfloat16()),
            TypeError,
            "causal_conv1d: weight is torch.bfloat16; beside x in torch.float32 it must be "
            "torch.float32",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT, activation="relu"),  # type: ignore[call-overload]
            ValueError,
            "activation='relu': must be 'none' or 'silu'",
        ),
        (
            lambda: causal_conv1d(X, WEIGHT, segment_ids=torch.zeros(2, 4).int()),
            ValueError,
            "causal_conv1d: segment_ids is [2, 4]; beside x [2, 3, 5] it must be [2, 3]",
        ),
        (
            lambda: causal_conv1d_step(X, X, WEIGHT),
            ValueError,
            "causal_conv1d_step: x is [2, 3, 5]; it must be (B, C)",
        ),
        (
            lambda: causal_conv1d_step(X[:, 1:], X[:, 0], WEIGHT),
            ValueError,
            "causal_conv1d_step: state is [2, 2, 5]; beside x [2, 1, 5] it must be [2, 3, 5]",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    call: Callable[[], object], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        call()
        return
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
