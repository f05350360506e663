"""Norms, rotary embedding and the gate of SwiGLU against their plain twins: values, two orders of
derivatives, every dtype, and every input that is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from interlace.kernels import (
    add_rms_norm,
    apply_rotary,
    gated_rms_norm,
    linear,
    rms_norm,
    rotary_tables,
    swiglu,
)
from interlace.kernels.linear import linear_reference
from interlace.kernels.rms_norm import gated_rms_norm_reference, rms_norm_reference
from interlace.kernels.rotary import apply_rotary_reference
from interlace.kernels.swiglu import swiglu_reference

EPSILON = 1e-3
TABLES = rotary_tables(torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]]), 4, 100.0)


@dataclass(frozen=True)
class Operation:
    """One operation, its plain twin, and the shapes of what it takes."""

    name: str
    call: Callable[..., Any]
    twin: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def added(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return x + residual, rms_norm_reference(x + residual, weight, EPSILON)


OPERATIONS = [
    Operation(
        "rms_norm",
        lambda x, weight: rms_norm(x, weight, EPSILON),
        lambda x, weight: rms_norm_reference(x, weight, EPSILON),
        ((2, 3, 6), (6,)),
    ),
    Operation(
        "add_rms_norm",
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPSILON),
        added,
        ((2, 3, 6), (2, 3, 6), (6,)),
    ),
    *(
        Operation(
            f"gated_rms_norm, {groups} groups",
            lambda *given, groups=groups: gated_rms_norm(*given, EPSILON, groups=groups),
            lambda *given, groups=groups: gated_rms_norm_reference(*given, EPSILON, groups=groups),
            ((2, 3, 6), (2, 3, 6), (6,)),
        )
        for groups in (1, 2, 6)
    ),
    Operation(
        "apply_rotary",
        lambda x: apply_rotary(x, *TABLES),
        lambda x: apply_rotary_reference(x, *TABLES),
        ((2, 3, 5, 4),),
    ),
    Operation(
        "apply_rotary, one table",
        lambda x: apply_rotary(x, *(table[:1] for table in TABLES)),
        lambda x: apply_rotary_reference(x, *(table[:1] for table in TABLES)),
        ((2, 1, 5, 4),),
    ),
    Operation("swiglu", swiglu, swiglu_reference, ((2, 7), (2, 7))),
    Operation("linear", linear, linear_reference, ((2, 3, 5), (4, 5))),
]
EACH = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def inputs(
    operation: Operation, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in operation.shapes
    ]


@EACH
def test_values_and_gradients_are_the_plain_twin_s(operation: Operation) -> None:
    found: list[list[torch.Tensor]] = []
    for call in (operation.call, operation.twin):
        tensors = inputs(operation)
        results = tree_leaves(call(*tensors))
        total = sum((out * torch.arange(out.numel()).view(out.shape)).sum() for out in results)
        found.append([*results, *torch.autograd.grad(total, tensors)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@EACH
def test_two_orders_of_derivatives_are_right(operation: Operation) -> None:
    tensors = inputs(operation)
    assert torch.autograd.gradcheck(operation.call, tensors)
    # Squared, so that an operation that is linear has a second derivative.
    squared = lambda *given: [out.square() for out in tree_leaves(operation.call(*given))]  # noqa: E731
    assert torch.autograd.gradgradcheck(squared, tensors)


@pytest.mark.parametrize("moved", ["first", "last", "all"])
@EACH
def test_tangents_and_their_gradients_are_the_plain_twin_s(
    operation: Operation, moved: str
) -> None:
    found: list[list[torch.Tensor | None]] = []
    for call in (operation.call, operation.twin):
        tensors, along = inputs(operation), inputs(operation, seed=1)
        chosen = {"first": [0], "last": [len(tensors) - 1], "all": range(len(tensors))}[moved]
        with forward_ad.dual_level():
            given = [
                forward_ad.make_dual(x, move) if number in chosen else x
                for number, (x, move) in enumerate(zip(tensors, along, strict=True))
            ]
            tangents = [forward_ad.unpack_dual(out).tangent for out in tree_leaves(call(*given))]
        total = sum(tangent.square().sum() for tangent in tangents if tangent is not None)
        gradients = torch.autograd.grad(total, [*tensors, *along], allow_unused=True)
        found.append([*tangents, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_tangent_of_a_linear_map_takes_two_products_and_four_in_reverse() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    along = torch.randn(5, 8, requires_grad=True)
    product, counts = 2 * 5 * 8 * 8, list[float]()
    with FlopCounterMode(display=False) as counter, forward_ad.dual_level():
        # Bent, so that value and tangent both have a gradient.
        result = linear(forward_ad.make_dual(x, along), weight).sin()
        tangent = forward_ad.unpack_dual(result).tangent
    counts.append(counter.get_total_flops() / product)
    assert tangent is not None
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(tangent.sum(), [x, along, weight])
    counts.append(counter.get_total_flops() / product)
    assert counts == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_results_are_rounded_once(operation: Operation, dtype: torch.dtype) -> None:
    # A residual sum is rounded before it is normalised.
    roundings = 2 if operation.name == "add_rms_norm" else 1
    tolerance = max(roundings * torch.finfo(dtype).eps / 2, 1e-6) * 1.001
    for seed in range(10):
        rough = [tensor.detach() for tensor in inputs(operation, dtype, seed)]
        exact = operation.twin(*(tensor.double() for tensor in rough))
        for one, other in zip(tree_leaves(operation.call(*rough)), tree_leaves(exact), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_gradients_have_the_dtypes_of_their_inputs(
    operation: Operation, dtype: torch.dtype
) -> None:
    rough = inputs(operation, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in rough]
    gradients = [
        torch.autograd.grad(sum(out.double().sum() for out in tree_leaves(call(*given))), given)
        for call, given in ((operation.call, rough), (operation.twin, exact))
    ]
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@EACH
def test_a_compiled_operation_has_the_same_gradients(operation: Operation) -> None:
    found: list[Sequence[torch.Tensor]] = []
    for call in (torch.compile(operation.call, backend="aot_eager"), operation.call):
        tensors = inputs(operation)
        total = sum(out.square().sum() for out in tree_leaves(call(*tensors)))
        found.append(torch.autograd.grad(total, tensors))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


class Kept(TorchDispatchMode):
    """Notes the dtypes of what operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        self.dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize(
    ("call", "shape"),
    [(swiglu, (2, 7)), (lambda a, b: apply_rotary(a, b[:, :1], b[:, :1]), (2, 3, 5, 4))],
    ids=["swiglu", "apply_rotary"],
)
def test_what_is_kept_for_backward_is_as_narrow_as_the_inputs(
    call: Callable[..., torch.Tensor], shape: tuple[int, ...]
) -> None:
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    one = torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)
    other = torch.ones(shape, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), Kept() as made:
        call(one, other)
    assert torch.float32 in made.dtypes
    assert len(kept) == 2
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


INTEGERS = zeros(2, 4, dtype=torch.int64)
REFUSED = {
    "rms_norm takes x (..., D) and weight (D,); got [2, 4] and [3]": (
        lambda: rms_norm(zeros(2, 4), zeros(3), EPSILON),
        ValueError,
    ),
    "rms_norm takes x (..., D) and weight (D,); got [] and []": (
        lambda: rms_norm(zeros(), zeros(), EPSILON),
        ValueError,
    ),
    "rms_norm: x must be floating; got torch.int64": (
        lambda: rms_norm(INTEGERS, zeros(4), EPSILON),
        TypeError,
    ),
    "add_rms_norm: residual must have the shape of x, [2, 4]; got [4]": (
        lambda: add_rms_norm(zeros(2, 4), zeros(4), zeros(4), EPSILON),
        ValueError,
    ),
    "add_rms_norm: residual must be floating; got torch.int64": (
        lambda: add_rms_norm(zeros(2, 4), INTEGERS, zeros(4), EPSILON),
        TypeError,
    ),
    "add_rms_norm takes x (..., D) and weight (D,); got [2, 4] and [3]": (
        lambda: add_rms_norm(zeros(2, 4), zeros(2, 4), zeros(3), EPSILON),
        ValueError,
    ),
    "gated_rms_norm: gate must have the shape of x, [2, 4]; got [2, 3]": (
        lambda: gated_rms_norm(zeros(2, 4), zeros(2, 3), zeros(4), EPSILON),
        ValueError,
    ),
    "gated_rms_norm: gate must be floating; got torch.int64": (
        lambda: gated_rms_norm(zeros(2, 4), INTEGERS, zeros(4), EPSILON),
        TypeError,
    ),
    "gated_rms_norm: groups=3 must divide D = 4": (
        lambda: gated_rms_norm(zeros(2, 4), zeros(2, 4), zeros(4), EPSILON, groups=3),
        ValueError,
    ),
    "gated_rms_norm: groups=0 must divide D = 4": (
        lambda: gated_rms_norm(zeros(2, 4), zeros(2, 4), zeros(4), EPSILON, groups=0),
        ValueError,
    ),
    "rotary_tables: positions must be integers; got torch.float32": (
        lambda: rotary_tables(zeros(2, 4), 4, 100.0),
        TypeError,
    ),
    "rotary_tables takes positions (B, T) and an even head width; got [2, 4] and head_width=5": (
        lambda: rotary_tables(INTEGERS, 5, 100.0),
        ValueError,
    ),
    "rotary_tables takes positions (B, T) and an even head width; got [4] and head_width=4": (
        lambda: rotary_tables(INTEGERS[0], 4, 100.0),
        ValueError,
    ),
    "apply_rotary: x must be floating; got torch.int64": (
        lambda: apply_rotary(INTEGERS, *TABLES),
        TypeError,
    ),
    "apply_rotary takes x (B, H, T, K) with K even, cosine and sine (B or 1, 1, T, K); got "
    "[2, 3, 6, 4], [2, 1, 5, 4] and [2, 1, 5, 4]": (
        lambda: apply_rotary(zeros(2, 3, 6, 4), *TABLES),
        ValueError,
    ),
    "apply_rotary takes x (B, H, T, K) with K even, cosine and sine (B or 1, 1, T, K); got "
    "[3, 5, 4], [2, 1, 5, 4] and [2, 1, 5, 4]": (
        lambda: apply_rotary(zeros(3, 5, 4), *TABLES),
        ValueError,
    ),
    "swiglu: up must have the shape of gate, [2, 4]; got [4]": (
        lambda: swiglu(zeros(2, 4), zeros(4)),
        ValueError,
    ),
    "swiglu: gate and up must be of one floating dtype; got torch.float32 and torch.int64": (
        lambda: swiglu(zeros(2, 4), INTEGERS),
        TypeError,
    ),
    "swiglu: gate and up must be of one floating dtype; got torch.int64 and torch.int64": (
        lambda: swiglu(INTEGERS, INTEGERS),
        TypeError,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_is_named(message: str) -> None:
    call, kind = REFUSED[message]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
