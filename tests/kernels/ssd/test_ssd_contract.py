"""What the scan promises beside its numbers: which back end runs and why, how often it can be
differentiated, what it refuses, and that compilers trace over it.
"""

import sys
from collections.abc import Callable

import pytest
import torch
from ssd_cases import documents, scan_inputs

from interlace.kernels import ssd, ssd_step
from interlace.kernels.ssd.api import ORDERS, choose_backend


def float_inputs(**sizes: int) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in scan_inputs(**sizes).items()}


def test_every_back_end_declares_how_often_it_can_be_differentiated() -> None:
    assert ORDERS == {"reference": "any", "chunked": "any", "triton": 1}


def test_a_cpu_takes_chunks_also_where_the_interpreter_is_on() -> None:
    x = torch.zeros(1, 1, 1, 1)
    chosen = choose_backend(x, x, "auto")
    assert chosen == ("chunked", "x is not on a GPU")
    assert choose_backend(x, x, "chunked").reason == "asked for"


def test_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 1)
    cases = [
        (x.double(), x, "x is torch.float64, and the kernels take float32, bfloat16 and float16"),
        (x, torch.zeros(1, 1, 1, 300), "B has 300 states, and the kernels take 256 at most"),
    ]
    for first, second, problem in cases:
        with pytest.raises(ValueError) as caught:
            choose_backend(first, second, "triton")
        assert str(caught.value) == f'ssd: backend="triton": {problem}; take backend="chunked"'
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="x is on cpu, and the kernels need a GPU"):
        choose_backend(x, x, "triton")


def test_a_missing_triton_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r'ssd with backend="triton" needs Triton.*pip install'):
        ssd(**float_inputs(length=3), backend="triton")


def test_an_unknown_back_end_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        ssd(**float_inputs(length=3), backend="magic")  # type: ignore[call-overload]
    assert str(caught.value) == (
        "backend='magic': must be 'auto', 'reference', 'chunked' or 'triton'"
    )


def test_chunks_that_the_kernels_cannot_take_are_named() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError) as caught:
        ssd(**float_inputs(length=3), backend="triton", chunk=48)
    assert str(caught.value) == ("ssd: chunk=48; the Triton kernels take a power of two from 16")


@pytest.mark.parametrize("through", ["y", "final states"])
def test_a_second_derivative_of_the_kernels_is_refused_with_the_remedy(through: str) -> None:
    pytest.importorskip("triton")
    tensors = float_inputs(batch=1, length=3, heads=2, groups=1)
    leaf = tensors["x"].requires_grad_()
    y, final = ssd(**tensors, backend="triton", chunk=16, return_final_states=True)
    output = y if through == "y" else final
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(output.sum(), leaf, create_graph=True)
    assert str(caught.value) == (
        "ssd: a second derivative was asked for (create_graph=True), but the triton back end has "
        'only the first; call ssd(..., backend="chunked")'
    )


def test_compilers_trace_over_the_kernels_with_first_derivatives() -> None:
    pytest.importorskip("triton")
    tensors = float_inputs(batch=1, length=9, heads=2, groups=1)
    segments = documents("long", 1, 9)

    def loss(x: torch.Tensor) -> torch.Tensor:
        others = {**tensors, "x": x}
        y, final = ssd(
            **others, segment_ids=segments, backend="triton", chunk=16, return_final_states=True
        )
        return y.square().sum() + final.sum()

    gradients: list[torch.Tensor] = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = tensors["x"].clone().requires_grad_()
        call(leaf).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_compilers_trace_through_the_chunks() -> None:
    tensors = float_inputs(length=20)
    segments = documents("long", 2, 20)
    call = lambda **t: ssd(**t, segment_ids=segments, chunk=8)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors), call(**tensors))


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    pytest.importorskip("triton")
    from interlace.kernels.ssd.operator import ssd_forward

    tensors = float_inputs(batch=1, length=4, heads=2, groups=1)
    tensors.pop("z")
    start = tensors.pop("initial_states")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    arguments = (*leaves, documents("short", 1, 4), start.requires_grad_(), 16)
    torch.library.opcheck(ssd_forward, arguments)
    leaves[-1] = None  # type: ignore[call-overload]
    torch.library.opcheck(ssd_forward, (*leaves, None, None, 16))


X = {name: tensor.float() for name, tensor in scan_inputs().items()}
SEGMENTS = torch.zeros(2, 29, dtype=torch.int64)

WRONG: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "x of three dimensions": (
        {"x": X["x"][0]},
        ValueError,
        "ssd: x is [29, 4, 5]; it must be (B, T, H, P), none of them 0",
    ),
    "no positions": (
        {"x": X["x"][:, :0]},
        ValueError,
        "ssd: x is [2, 0, 4, 5]; it must be (B, T, H, P), none of them 0",
    ),
    "an integer x": (
        {"x": X["x"].int()},
        TypeError,
        "ssd: x is torch.int32; it must be one of torch.float64, torch.float32, torch.bfloat16, "
        "torch.float16",
    ),
    "a shorter dt": (
        {"dt": X["dt"][:, 1:]},
        ValueError,
        "ssd: dt is [2, 28, 4]; beside x [2, 29, 4, 5] it must be [2, 29, 4]",
    ),
    "A per channel": (
        {"A": X["D"]},
        ValueError,
        "ssd: A is [4, 5]; beside x [2, 29, 4, 5] it must be [4]",
    ),
    "B without groups": (
        {"B": X["B"][:, :, 0]},
        ValueError,
        "ssd: B is [2, 29, 6]; it must be (B, T, G, N)",
    ),
    "groups that do not divide": (
        {"B": torch.zeros(2, 29, 3, 6)},
        ValueError,
        "ssd: B has 3 groups of 6 states for the 4 heads of x; the groups must divide the heads, "
        "and there must be a state",
    ),
    "C of other groups": (
        {"C": X["C"][:, :, :1]},
        ValueError,
        "ssd: C is [2, 29, 1, 6]; beside x [2, 29, 4, 5] it must be [2, 29, 2, 6]",
    ),
    "D of another width": (
        {"D": X["D"][:, 1:]},
        ValueError,
        "ssd: D is [4, 4]; beside x [2, 29, 4, 5] it must be [4, 5]",
    ),
    "z of another width": (
        {"z": X["z"][..., 1:]},
        ValueError,
        "ssd: z is [2, 29, 4, 4]; beside x [2, 29, 4, 5] it must be [2, 29, 4, 5]",
    ),
    "initial states turned": (
        {"initial_states": X["initial_states"].mT},
        ValueError,
        "ssd: initial_states is [2, 4, 6, 5]; beside x [2, 29, 4, 5] it must be [2, 4, 5, 6]",
    ),
    "narrow B": (
        {"B": X["B"].bfloat16()},
        TypeError,
        "ssd: B is torch.bfloat16; beside x in torch.float32 it must be torch.float32",
    ),
    "wide dt": (
        {"x": X["x"].bfloat16(), "dt": X["dt"].double()},
        TypeError,
        "ssd: dt is torch.float64; beside x in torch.bfloat16 it must be torch.bfloat16 or "
        "torch.float32",
    ),
    "another device": (
        {"C": X["C"].to("meta")},
        ValueError,
        "ssd: C is on meta, x on cpu",
    ),
    "segments of another length": (
        {"segment_ids": SEGMENTS[:, 1:]},
        ValueError,
        "ssd: segment_ids is [2, 28]; beside x [2, 29, 4, 5] it must be [2, 29]",
    ),
    "segments of floats": (
        {"segment_ids": SEGMENTS.float()},
        TypeError,
        "ssd: segment_ids is torch.float32; it must be integers",
    ),
    "segments elsewhere": (
        {"segment_ids": SEGMENTS.to("meta")},
        ValueError,
        "ssd: segment_ids is on meta, x on cpu",
    ),
    "empty chunks": ({"chunk": 0}, ValueError, "ssd: chunk=0; it must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_what_would(name: str) -> None:
    changed, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        ssd(**{**X, **changed})  # type: ignore[call-overload]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {**a, "x": a["x"][0]},
            "ssd_step: x is [4, 5]; it must be (B, H, P)",
        ),
        (
            lambda a: {**a, "B": a["B"][0]},
            "ssd_step: B is [2, 6]; it must be (B, G, N)",
        ),
        (
            lambda a: {**a, "state": a["state"].mT},
            "ssd_step: state is [2, 4, 6, 5]; beside x [2, 4, 5] it must be [2, 4, 5, 6]",
        ),
    ],
)
def test_a_step_says_what_does_not_fit(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    right = {name: X[name][:, 0] for name in ("x", "dt", "B", "C")} | {"A": X["A"]}
    right["state"] = X["initial_states"]
    ssd_step(**right)
    with pytest.raises(ValueError) as caught:
        ssd_step(**change(right))
    assert str(caught.value) == message
