"""State-space duality in plain torch: the recurrence, chunks, single steps and documents agree, in
fp64, with first and second derivatives.
"""

import math

import pytest
import torch
from ssd_cases import (
    Tensors,
    documents,
    largest_error,
    scan_inputs,
    values_and_gradients,
    with_mixed_steps,
)
from torch.utils._python_dispatch import TorchDispatchMode

from interlace.kernels import ssd, ssd_step

KINDS = ["none", "long", "short"]


def test_the_recurrence_equals_a_loop_over_numbers() -> None:
    inputs = scan_inputs(1, 7, 2, 2, 1, 3)
    segments = torch.tensor([[4, 4, 4, 1, 1, 4, 4]])
    y, final = ssd(**inputs, segment_ids=segments, return_final_states=True, backend="reference")
    x, dt, A, B, C, D, z, start = (tensor.tolist() for tensor in inputs.values())
    for h in range(2):
        for p in range(2):
            state = start[0][h][p]
            for t in range(7):
                if t in (3, 5):
                    state = [0.0] * 3
                decay = math.exp(dt[0][t][h] * A[h])
                state = [
                    decay * s + dt[0][t][h] * x[0][t][h][p] * b
                    for s, b in zip(state, B[0][t][0], strict=True)
                ]
                read = sum(s * c for s, c in zip(state, C[0][t][0], strict=True))
                gate = z[0][t][h][p] / (1 + math.exp(-z[0][t][h][p]))
                expected = (read + D[h][p] * x[0][t][h][p]) * gate
                assert float(y[0, t, h, p]) == pytest.approx(expected, rel=1e-12)
            assert final[0, h, p].tolist() == pytest.approx(state, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 29, 64])
def test_chunks_of_any_size_equal_the_recurrence_with_their_gradients(
    chunk: int, kind: str
) -> None:
    inputs, segments = scan_inputs(), documents(kind, 2, 29)
    options = {"segment_ids": segments, "return_final_states": True}
    exact = values_and_gradients(ssd, inputs, backend="reference", **options)
    found = values_and_gradients(ssd, inputs, backend="chunked", chunk=chunk, **options)
    assert largest_error(found, exact) < (1e-13, "")


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_the_whole(kind: str) -> None:
    inputs, segments = scan_inputs(), documents(kind, 2, 29)
    whole, final = ssd(**inputs, segment_ids=segments, return_final_states=True)
    state = inputs["initial_states"]
    for t in range(29):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        x, dt, B, C, z = (inputs[name][:, t] for name in ("x", "dt", "B", "C", "z"))
        y, state = ssd_step(state, x, dt, inputs["A"], B, C, D=inputs["D"], z=z)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def small() -> Tensors:
    return {name: t.requires_grad_() for name, t in scan_inputs(1, 5, 2, 2, 1, 2).items()}


@pytest.mark.parametrize("kind", ["none", "short"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_every_derivative_is_that_of_finite_differences_twice(backend: str, kind: str) -> None:
    inputs, segments = small(), documents(kind, 1, 5)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return ssd(
            **named, segment_ids=segments, return_final_states=True, chunk=2, backend=backend
        )  # type: ignore[call-overload]

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()))


def test_a_single_step_has_second_derivatives() -> None:
    inputs = small()
    state = inputs.pop("initial_states")
    one = {k: t[:, 0].detach().requires_grad_() if t.ndim > 2 else t for k, t in inputs.items()}

    def call(state: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, A, B, C, D, z = tensors
        return ssd_step(state, x, dt, A, B, C, D=D, z=z)

    assert torch.autograd.gradcheck(call, (state, *one.values()))
    assert torch.autograd.gradgradcheck(call, (state, *one.values()))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_runs(backend: str) -> None:
    lengths = [1, 6, 1, 1, 13, 7]
    inputs = scan_inputs(1, sum(lengths))
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    packed, final = ssd(
        **inputs, segment_ids=numbers, return_final_states=True, chunk=8, backend=backend
    )  # type: ignore[call-overload]
    start = inputs.pop("initial_states")
    by_position = ("x", "dt", "B", "C", "z")
    for n, piece in enumerate(packed.split(lengths, dim=1)):
        begin = sum(lengths[:n])
        part = {
            name: tensor[:, begin : begin + lengths[n]] if name in by_position else tensor
            for name, tensor in inputs.items()
        }
        state = start if n == 0 else torch.zeros_like(start)
        alone, end = ssd(
            **part, initial_states=state, return_final_states=True, chunk=8, backend=backend
        )  # type: ignore[call-overload]
        torch.testing.assert_close(piece, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, end, rtol=1e-12, atol=1e-12)


def test_a_sequence_may_be_run_in_pieces() -> None:
    inputs = scan_inputs()
    whole, final = ssd(**inputs, return_final_states=True, chunk=8)
    state, pieces = inputs.pop("initial_states"), []
    for begin, end in ((0, 1), (1, 17), (17, 29)):
        part = {name: t[:, begin:end] if t.ndim > 2 else t for name, t in inputs.items()}
        y, state = ssd(**part, initial_states=state, return_final_states=True, chunk=8)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_one_weight_per_head_skips_like_equal_weights_per_channel() -> None:
    inputs = scan_inputs()
    inputs["D"] = inputs["D"][:, :1].expand(-1, 5)
    wide = ssd(**inputs)
    inputs["D"] = inputs["D"][:, 0]
    torch.testing.assert_close(ssd(**inputs), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_small_dtypes_are_computed_in_fp32(dtype: torch.dtype, backend: str) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in scan_inputs(length=100).items()}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    options = {"return_final_states": True, "segment_ids": documents("long", 2, 100)}
    y, final = ssd(**tensors, **options, backend=backend)
    y64, final64 = ssd(**exact, **options, backend="reference")
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    # One rounding at the end; the final states have none.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=eps, atol=2e-5)
    torch.testing.assert_close(final.double(), final64, rtol=1e-5, atol=1e-5)


def test_narrow_inputs_may_come_with_wide_parameters() -> None:
    wide = ("dt", "A", "D", "initial_states")
    tensors = {k: t.float() if k in wide else t.bfloat16() for k, t in scan_inputs().items()}
    found = values_and_gradients(ssd, tensors)
    assert {k: t.dtype for k, t in found.items() if k[2:] in tensors} == {
        f"d {k}": t.dtype for k, t in tensors.items()
    }


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_sixteen_thousand_positions_in_bfloat16_stay_finite(scale: float) -> None:
    """Large steps make exponents that point backwards in time overflow if they are not masked."""
    tensors = scan_inputs(1, 16384, 2, 4, 1, 4, extras=False)
    tensors["dt"] = tensors["dt"] * scale
    rough = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    found = values_and_gradients(ssd, rough, return_final_states=True)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    exact = {name: tensor.double() for name, tensor in rough.items()}
    whole = values_and_gradients(ssd, exact, return_final_states=True, chunk=128)
    # Each output and gradient is rounded to bfloat16 once.
    assert largest_error(found, whole) < (2**-8, "")


def test_decays_are_right_where_large_and_small_steps_mix() -> None:
    tensors = with_mixed_steps(scan_inputs(1, 512, 2, 4, 1, 4))
    exact = values_and_gradients(ssd, tensors, backend="reference")
    narrow = {name: tensor.float() for name, tensor in tensors.items()}
    for backend in ("reference", "chunked"):
        found = values_and_gradients(ssd, narrow, backend=backend)
        # Differences of sums from the beginning of a chunk miss this by a factor of five.
        assert largest_error(found, exact) < (1e-6, ""), backend


class Elements(TorchDispatchMode):
    """Adds up the elements of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operation(*args, **(kwargs or {}))
        self.total += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def test_work_and_memory_of_chunks_are_linear_in_the_length() -> None:
    totals = []
    for length in (512, 1024, 2048):
        tensors = {k: t.requires_grad_() for k, t in scan_inputs(1, length, extras=False).items()}
        with Elements() as elements:
            ssd(**tensors, chunk=32).sum().backward()
        totals.append(elements.total)
    assert totals[2] - totals[1] == pytest.approx(2 * (totals[1] - totals[0]), rel=0.02)
