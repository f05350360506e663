"""Row blocks: parts of one tensor that are updated with hyperparameters of their own.

A fused projection holds rows of several kinds, and under the maximal update parametrisation (arXiv
2203.03466) each kind has its own learning rate, decay and threshold. A parameter group may list
them as `row_blocks`, dicts such as `{"rows": 128, "lr": 0.25}`: consecutive rows (dimension 0) of
every parameter of the group, and by what the group's hyperparameters are multiplied there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ROW_BLOCKS = "row_blocks"
"""Key of parameter groups."""

ROWS = "rows"
"""Key of a block that is no factor."""

FACTORS = ("lr", "weight_decay", "eps", "threshold")
"""Hyperparameters that a block may scale."""


def blocks_of(group: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """Return the row blocks of a parameter group; none where tensors are all of a kind."""
    return group.get(ROW_BLOCKS) or ()


def block_count(group: Mapping[str, Any]) -> int:
    """Return how many blocks each tensor of a group has; one that is all of a kind is one block."""
    return max(1, len(blocks_of(group)))


def local_blocks(
    group: Mapping[str, Any], parameter: torch.Tensor
) -> Iterator[tuple[int, int, int]]:
    """Yield `(block, start, stop)` for the blocks that this rank has a part of, in elements of its
    own, contiguous part of a parameter.
    """
    blocks, here = blocks_of(group), parameter.detach()
    elements = (here.to_local() if isinstance(here, DTensor) else here).numel()
    if not blocks or not elements:
        yield 0, 0, elements
        return
    local_shape, first_row = rows_here(parameter)
    last_row, per_row = first_row + local_shape[0], elements // local_shape[0]
    start = 0
    for number, block in enumerate(blocks):
        stop = start + int(block[ROWS])
        low, high = max(start, first_row), min(stop, last_row)
        if low < high:
            yield number, (low - first_row) * per_row, (high - first_row) * per_row
        start = stop


def rows_here(parameter: torch.Tensor) -> tuple[torch.Size, int]:
    """Return the shape of this rank's part of a parameter, and its first row in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.shape, 0
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return torch.Size(shape), offset[0] if offset else 0


def check_row_blocks(group: Mapping[str, Any], parameter: torch.Tensor) -> None:
    """Raise `ValueError` unless the blocks of a group are rows of a parameter, all of them, and
    scale what can be scaled.
    """
    blocks = blocks_of(group)
    if not blocks:
        return
    shape = tuple(parameter.shape)
    rows = sum(int(block.get(ROWS, 0)) for block in blocks)
    if not shape or rows != shape[0] or min(block.get(ROWS, 0) for block in blocks) < 1:
        raise ValueError(
            f"row_blocks: {[block.get(ROWS) for block in blocks]} rows are not those of a "
            f"parameter of shape {shape}; every block has 1 or more, together {shape[:1]}"
        )
    unknown = {key for block in blocks for key in block} - {ROWS, *FACTORS}
    if unknown:
        raise ValueError(
            f"row_blocks: {sorted(unknown)} cannot be scaled; a block has {ROWS!r} and factors of "
            f"{', '.join(FACTORS)}"
        )
