"""What `ssd` and `ssd_step` refuse: every message names the argument, what it is and what it must
be.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    """The tensors of `ssd`; see there."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    segment_ids: torch.Tensor | None
    initial_states: torch.Tensor | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and decays: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def check(inputs: Inputs, chunk: int | None) -> None:
    """Raise unless everything fits `x`.

    Raises:
        ValueError: A shape, a device or the size of chunks is wrong.
        TypeError: A dtype is wrong.
    """
    x, D = inputs.x, inputs.D
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"ssd: x is {list(x.shape)}; it must be (B, T, H, P), none of them 0")
    batch, length, heads, width = x.shape
    groups, states = check_groups("ssd", inputs.B, heads, dims=4)
    shapes = {
        "dt": (inputs.dt, (batch, length, heads)),
        "A": (inputs.A, (heads,)),
        "B": (inputs.B, (batch, length, groups, states)),
        "C": (inputs.C, (batch, length, groups, states)),
        "D": (D, (heads, width) if D is not None and D.ndim == 2 else (heads,)),
        "z": (inputs.z, (batch, length, heads, width)),
        "initial_states": (inputs.initial_states, (batch, heads, width, states)),
    }
    check_tensors("ssd", x, shapes, small=("dt", "A", "D", "initial_states"))
    check_segments("ssd", x, inputs.segment_ids)
    if chunk is not None and chunk < 1:
        raise ValueError(f"ssd: chunk={chunk}; it must be at least 1")


def check_tensors(
    operation: str,
    x: torch.Tensor,
    shapes: Mapping[str, tuple[torch.Tensor | None, Sequence[int]]],
    small: Sequence[str],
) -> None:
    """Raise unless every tensor has its shape, its dtype and the device of `x`.

    Args:
        operation: Name in the messages.
        x: The tensor that the others are compared with.
        shapes: Tensor (or None) and shape that it must have, by name.
        small: Names that may also be in the dtype of the state.

    Raises:
        ValueError: A shape or device is wrong.
        TypeError: A dtype is wrong.
    """
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{operation}: x is {x.dtype}; it must be one of {wanted}")
    wide = state_dtype(x.dtype)
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"{operation}: {name} is {list(tensor.shape)}; beside x {list(x.shape)} it must be "
                f"{list(shape)}"
            )
        allowed = dict.fromkeys((x.dtype, wide)) if name in small else {x.dtype: None}
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype}; beside x in {x.dtype} it must be "
                f"{' or '.join(str(dtype) for dtype in allowed)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, x on {x.device}")


def check_groups(operation: str, B: torch.Tensor, heads: int, dims: int) -> tuple[int, int]:
    """Return groups and state width of `B`, whose last two dimensions they are.

    Raises:
        ValueError: `B` has not `dims` dimensions, or its groups do not divide the heads.
    """
    form = "(B, T, G, N)" if dims == 4 else "(B, G, N)"
    if B.ndim != dims:
        raise ValueError(f"{operation}: B is {list(B.shape)}; it must be {form}")
    groups, states = B.shape[-2:]
    if groups == 0 or heads % groups or states == 0:
        raise ValueError(
            f"{operation}: B has {groups} groups of {states} states for the {heads} heads of x; "
            "the groups must divide the heads, and there must be a state"
        )
    return groups, states


def check_segments(operation: str, x: torch.Tensor, segment_ids: torch.Tensor | None) -> None:
    """Raise unless segments are (B, T) integers on the device of `x`.

    Raises:
        ValueError: The shape or the device is wrong.
        TypeError: They are not integers.
    """
    if segment_ids is None:
        return
    wanted = list(x.shape[:2])
    if list(segment_ids.shape) != wanted:
        raise ValueError(
            f"{operation}: segment_ids is {list(segment_ids.shape)}; beside x {list(x.shape)} it "
            f"must be {wanted}"
        )
    kind = segment_ids.dtype
    if kind.is_floating_point or kind.is_complex or kind is torch.bool:
        raise TypeError(f"{operation}: segment_ids is {kind}; it must be integers")
    if segment_ids.device != x.device:
        raise ValueError(f"{operation}: segment_ids is on {segment_ids.device}, x on {x.device}")
