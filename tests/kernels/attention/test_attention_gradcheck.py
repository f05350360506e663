"""Finite differences of every back end that claims two orders, forward and reverse mode."""

import pytest
import torch
from attention_cases import CASES, Case, plain

from interlace.kernels import attention
from interlace.kernels.attention import slices
from interlace.kernels.attention.triton import tuning

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(16, 16))
    monkeypatch.setattr(slices, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(slices, "LEAST_QUERIES", 2)


TINY = {
    "causal": Case(heads=1, groups=1, queries=3, keys=4, width=2),
    "softcap, window": Case(
        heads=1, groups=1, queries=4, keys=4, width=2, options={"softcap": 0.9, "window": 2}
    ),
    "documents, ALiBi, no causal order": Case(
        heads=1, groups=1, queries=3, keys=3, width=2,
        options={
            "cu_seqlens": torch.tensor([0, 2, 3]),
            "causal": False,
            "alibi_slopes": torch.tensor([0.4]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(
            name,
            backend,
            marks=pytest.mark.long if backend == "triton" and name != "softcap, window" else (),
        )
        for name in TINY
        for backend in ("reference", "chunked", "triton")
    ],
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    name: str, backend: str
) -> None:
    case = TINY[name]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        return attention(q, k, v, **case.options, return_lse=True, order=2, backend=backend)

    # The fast mode probes random directions; in the interpreter each probe takes a second.
    fast = backend != "chunked"
    assert torch.autograd.gradcheck(call, case.tensors(), check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(
        call, case.tensors(), check_fwd_over_rev=True, fast_mode=fast
    )


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("name", ["segments", "fewer queries"])
def test_tangents_and_their_gradients_equal_the_plain_twin_s(name: str, backend: str) -> None:
    """Forward mode, reverse over forward, and forward over reverse."""
    case = CASES[name]
    tensors = case.tensors()
    along = tuple(x.detach() for x in case.tensors(seed=1))

    def ours(*x: torch.Tensor) -> Tensors:
        return attention(*x, **case.options, return_lse=True, order=2, backend=backend)

    def twin(*x: torch.Tensor) -> Tensors:
        return plain(case, *x)

    def through(call: object) -> list[torch.Tensor]:
        def energy(*x: torch.Tensor) -> torch.Tensor:
            out, lse = call(*x)  # type: ignore[operator]
            return out.square().sum() + lse.sin().sum()

        _, tangents = torch.func.jvp(call, tensors, along)  # type: ignore[arg-type]
        reversed_ = torch.autograd.grad(sum(t.square().sum() for t in tangents), tensors)
        gradient = torch.func.grad(energy, argnums=(0, 1, 2))
        _, products = torch.func.jvp(gradient, tensors, along)
        return [*tangents, *reversed_, *products]

    for found, exact in zip(through(ours), through(twin), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_the_third_derivative_is_there_or_refused() -> None:
    case = Case(heads=1, groups=1, queries=3, keys=3, width=2)

    def third(backend: str) -> Tensors:
        q, k, v = case.tensors()
        out = attention(q, k, v, order=2, backend=backend)
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
        return torch.autograd.grad(second.cos().sum(), (q, k, v))

    for found, exact in zip(third("chunked"), third("reference"), strict=True):
        torch.testing.assert_close(found, exact)
    with pytest.raises(RuntimeError, match=r'third derivative .* backend="chunked"'):
        third("triton")


def test_masks_read_under_a_transform_do_not_outlive_it() -> None:
    case = CASES["segments"]
    tensors = tuple(x.detach() for x in case.tensors())

    def energy(q: torch.Tensor) -> torch.Tensor:
        mixed = attention(q, *tensors[1:], **case.options, order=2, backend="chunked")
        return mixed.square().sum()

    inside = torch.func.grad(energy)(tensors[0])
    outside = energy(q := tensors[0].clone().requires_grad_())
    assert torch.equal(torch.autograd.grad(outside, q)[0], inside)
