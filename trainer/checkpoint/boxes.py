"""A run of elements of a flattened tensor, as boxes of the tensor.

ZeRO cuts tensors anywhere in their row-major order, a checkpoint holds boxes. A run is at most one
box of whole rows and what is left of the rows at its two ends, which are runs in one dimension
less: up to 2 n - 1 boxes for n dimensions.
"""

from dataclasses import dataclass
from math import prod

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box inside a tensor: where it begins, and its size, in every dimension."""

    offset: Extent
    shape: Extent

    @property
    def elements(self) -> int:
        """How many are in it."""
        return prod(self.shape)


def boxes_of(shape: Extent, start: int, stop: int) -> list[Box]:
    """Return boxes that together hold the elements `start` to `stop`, in that order, of a tensor in
    row-major order; each holds consecutive ones.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,) * len(shape), (stop - start,) * len(shape))]
    row = prod(shape[1:])
    first, before = divmod(start, row)
    last, after = divmod(stop, row)
    if first == last:
        return in_row(first, boxes_of(shape[1:], before, after))
    found = in_row(first, boxes_of(shape[1:], before, row)) if before else []
    begin = first + (before > 0)
    if begin < last:
        found.append(Box((begin, *(0 for _ in shape[1:])), (last - begin, *shape[1:])))
    return found + in_row(last, boxes_of(shape[1:], 0, after))


def in_row(number: int, boxes: list[Box]) -> list[Box]:
    """Return boxes of one row as boxes of the tensor."""
    return [Box((number, *box.offset), (1, *box.shape)) for box in boxes]
