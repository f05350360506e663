"""What only a GPU can show of the scan and the convolution: compiled kernels in bf16 and fp32 near
fp64, the same bits every time, long sequences, and torch.compile over them.
"""

from typing import Any

import pytest
import torch
from ssd_cases import Tensors, documents, largest_error, scan_inputs, values_and_gradients

from interlace.kernels import causal_conv1d, ssd
from interlace.kernels.conv1d.api import choose_backend as choose_convolution
from interlace.kernels.ssd.api import choose_backend

pytestmark = pytest.mark.gpu

SHAPES = [
    {"batch": 2, "length": 700, "heads": 8, "width": 64, "groups": 1, "states": 128},
    {"batch": 1, "length": 1100, "heads": 4, "width": 64, "groups": 2, "states": 64},
    {"batch": 1, "length": 300, "heads": 2, "width": 80, "groups": 1, "states": 256},
]


def on_gpu(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return inputs rounded to a dtype; decays and weights stay fp32."""
    wide = ("dt", "A", "D", "initial_states")
    return {k: t.to("cuda", torch.float32 if k in wide else dtype) for k, t in tensors.items()}


def exact_twin(tensors: Tensors, **options: Any) -> Tensors:
    """Return values and gradients of the chunked twin in fp64."""
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    found = values_and_gradients(ssd, doubles, backend="chunked", chunk=64, **options)
    return {name: tensor.cpu() for name, tensor in found.items()}


def kernels(tensors: Tensors, **options: Any) -> Tensors:
    found = values_and_gradients(ssd, tensors, backend="triton", **options)
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("kind", ["none", "long", "short"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=str,
)
def test_compiled_kernels_are_near_fp64(
    shape: dict[str, int], kind: str, dtype: torch.dtype, bound: float
) -> None:
    tensors = on_gpu(scan_inputs(**shape), dtype)
    segments = documents(kind, shape["batch"], shape["length"])
    options = {
        "segment_ids": None if segments is None else segments.cuda(),
        "return_final_states": True,
    }
    error = largest_error(kernels(tensors, **options), exact_twin(tensors, **options))
    assert error < (bound, "")


def test_a_gpu_takes_the_kernels_by_itself() -> None:
    tensors = on_gpu(scan_inputs(length=40), torch.bfloat16)
    assert choose_backend(tensors["x"], tensors["B"], "auto") == ("triton", "x is on a GPU")
    x = tensors["x"].flatten(2)
    assert choose_convolution(x, torch.zeros(20, 4), "auto").backend == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    tensors = on_gpu(scan_inputs(**SHAPES[0]), dtype)
    segments = documents("long", 2, 700)
    assert segments is not None
    options = {"segment_ids": segments.cuda(), "return_final_states": True}
    first = kernels(tensors, **options)
    for _ in range(5):
        again = kernels(tensors, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_sixteen_thousand_positions_in_bfloat16_stay_finite(scale: float) -> None:
    tensors = scan_inputs(1, 16384, 2, 64, 1, 64, extras=False)
    tensors["dt"] = tensors["dt"] * scale
    found = kernels(on_gpu(tensors, torch.bfloat16), return_final_states=True)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_a_compiled_function_runs_the_kernels() -> None:
    tensors = on_gpu(scan_inputs(1, 200, 4, 64, 1, 64), torch.bfloat16)
    segments = torch.arange(200, device="cuda")[None] // 70
    weight = torch.randn(256, 4, device="cuda")

    def loss(x: torch.Tensor) -> torch.Tensor:
        mixed = causal_conv1d(x.flatten(2), weight, activation="silu", segment_ids=segments)
        given = {**tensors, "x": mixed.unflatten(2, (4, 64))}
        return ssd(**given, segment_ids=segments).float().square().sum()

    gradients: list[torch.Tensor] = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaf = tensors["x"].clone().requires_grad_()
        call(leaf).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_convolution_is_near_fp64_and_repeats_its_bits(
    dtype: torch.dtype, activation: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 1000, 200), "weight": (200, 4), "bias": (200,), "initial_states": (2, 3, 200)}
    tensors = {
        name: torch.randn(size, generator=generator).to("cuda", dtype)
        for name, size in sizes.items()
    }
    segments = documents("long", 2, 1000)
    assert segments is not None
    options = {"activation": activation, "segment_ids": segments.cuda()}
    first, second = (
        values_and_gradients(causal_conv1d, tensors, backend="triton", **options) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = values_and_gradients(causal_conv1d, doubles, backend="shifted", **options)
    bound = 2e-6 if dtype is torch.float32 else 2**-8
    assert largest_error(first, exact) < (bound, "")
