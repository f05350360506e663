"""The tensor layer over the commit protocol: shards in safetensors, one canonical index over all of
them.

Every rank writes the slices it owns into one file of its own, in parallel and piece by piece. The
index names each tensor once, by its canonical name, with its global shape and where each slice
lies; it knows nothing of ranks, so any number of ranks reads what any other number wrote, by
intersecting slices.
Reading never unpickles.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from interlace.trainer.checkpoint.header import Expected, check_header
from interlace.trainer.errors import CheckpointError

Extent = tuple[Annotated[int, Field(ge=0)], ...]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Slice(BaseModel):
    """A box of one global tensor and the file that holds it, under the tensor's name or, where one
    file holds several boxes of a tensor, under a `key` of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str
    offset: Extent
    shape: Extent
    key: str | None = None

    def key_for(self, name: str) -> str:
        """Return under which key the file holds this box of the tensor of that name."""
        return self.key or name


class TensorEntry(BaseModel):
    """One global tensor: safetensors dtype name, shape, and the slices that cover it exactly
    once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    shape: Extent
    slices: tuple[Slice, ...]


TensorIndex = dict[str, TensorEntry]


@dataclass(frozen=True)
class LocalPart:
    """This rank's part of one global tensor, as a view of the live memory.

    Attributes:
        data: Local elements, shape `shape`; writing to it writes to the tensor.
        offset: Where the part begins in the global tensor.
        global_shape: Shape of the whole tensor.
        owned: Whether this rank writes the part (the first of several replicas does).
    """

    data: torch.Tensor
    offset: Extent
    global_shape: Extent
    owned: bool


@dataclass(frozen=True)
class Placed:
    """What a file holds of one tensor: a box of its elements.

    Attributes:
        name: Of the tensor.
        dtype: Of the elements.
        shape: Of the box.
        offset: Where the box begins in the whole tensor.
        global_shape: Of the whole tensor.
    """

    name: str
    dtype: torch.dtype
    shape: Extent
    offset: Extent
    global_shape: Extent

    @property
    def bytes(self) -> int:
        """Size of the box."""
        return prod(self.shape) * self.dtype.itemsize


def local_part(tensor: torch.Tensor, rank: int) -> LocalPart:
    """Return this rank's part of a plain tensor (all of it, owned by rank 0) or of a `DTensor`."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return LocalPart(tensor, (0,) * len(shape), shape, owned=rank == 0)
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no part of its tensors"
    first = all(
        place == 0
        for place, placement in zip(coordinate, placements, strict=True)
        if isinstance(placement, Replicate)
    )
    local = tensor.to_local()
    return LocalPart(local, tuple(offset), tuple(tensor.shape), owned=first and local.numel() > 0)


def index_of(file: str, parts: Mapping[str, Placed]) -> TensorIndex:
    """Return the index of one file that holds these parts, by key."""
    index: TensorIndex = {}
    for key, part in parts.items():
        own = None if key == part.name else key
        held = Slice(file=file, offset=part.offset, shape=part.shape, key=own)
        known = index.get(part.name)
        index[part.name] = TensorEntry(
            dtype=DTYPE_NAMES[part.dtype],
            shape=part.global_shape,
            slices=(*(known.slices if known else ()), held),
        )
    return index


def safetensors_head(parts: Mapping[str, Placed]) -> bytes:
    """Return the beginning of a safetensors file, behind which the bytes of all parts follow in the
    same order.

    The library's own writer wants the whole file in memory before it can be hashed. Layout: eight
    bytes of header length (little-endian), a JSON header padded to eight bytes.
    """
    header: dict[str, object] = {}
    position = 0
    for name, part in parts.items():
        end = position + part.bytes
        header[name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def merge_indexes(indexes: Sequence[TensorIndex]) -> TensorIndex:
    """Join the indexes of all ranks and check that every element of every tensor is held exactly
    once.
    """
    merged: TensorIndex = {}
    for index in indexes:
        for name, entry in index.items():
            known = merged.get(name)
            slices = entry.slices if known is None else known.slices + entry.slices
            merged[name] = entry.model_copy(update={"slices": slices})
    for name, entry in merged.items():
        check_coverage(name, entry)
    return dict(sorted(merged.items()))


def check_coverage(name: str, entry: TensorEntry) -> None:
    """Raise `CheckpointError` unless the slices of a tensor cover it exactly once."""
    held = sum(prod(part.shape) for part in entry.slices)
    inside = all(
        len(part.offset) == len(part.shape) == len(entry.shape)
        and all(
            start >= 0 and start + size <= whole
            for start, size, whole in zip(part.offset, part.shape, entry.shape, strict=True)
        )
        for part in entry.slices
    )
    if not (inside and held == prod(entry.shape) and not overlap(entry.slices)):
        raise CheckpointError(
            f"tensor {name}: its slices hold {held:,} of {prod(entry.shape):,} elements, or "
            "overlap; "
            "the checkpoint cannot be trusted"
        )


def overlap(slices: Sequence[Slice]) -> bool:
    """Return whether any two slices of one tensor share an element; those of a few ranks share
    rows, so that each is compared with few.
    """
    open_ones: list[Slice] = []
    for one in sorted(slices, key=lambda each: each.offset):
        rows = one.offset[:1]
        open_ones = [
            other for other in open_ones if not rows or other.offset[0] + other.shape[0] > rows[0]
        ]
        if any(
            intersection(one.offset, one.shape, other.offset, other.shape) is not None
            for other in open_ones
        ):
            return True
        open_ones.append(one)
    return False


def intersection(
    offset: Extent, shape: Extent, other_offset: Extent, other_shape: Extent
) -> tuple[Extent, Extent] | None:
    """Return offset and shape of the box that two boxes share, or None where they share nothing."""
    start = tuple(max(pair) for pair in zip(offset, other_offset, strict=True))
    stop = tuple(
        min(a + n, b + m)
        for a, n, b, m in zip(offset, shape, other_offset, other_shape, strict=True)
    )
    size = tuple(high - low for low, high in zip(start, stop, strict=True))
    return (start, size) if all(length > 0 for length in size) else None


def parse_index(document: object) -> TensorIndex:
    """Read an index from manifest JSON; `CheckpointError` if it does not have the right form."""
    try:
        if not isinstance(document, dict):
            raise CheckpointError("the tensor index of the manifest is not a table")
        index = {str(name): TensorEntry.model_validate(entry) for name, entry in document.items()}
    except ValidationError as error:
        raise CheckpointError(f"the tensor index of the manifest is malformed: {error}") from error
    for name, entry in index.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"tensor {name}: no checkpoint holds the dtype {entry.dtype!r}")
        check_coverage(name, entry)
    return index


class TensorReader:
    """Reads any box of any tensor of one checkpoint.

    Args:
        index: Where every tensor lies.
        files: Path of every file the index names; digests must have been checked before.
    """

    def __init__(self, index: TensorIndex, files: Mapping[str, Path]) -> None:
        self.index = index
        self.files = files

    def check_file(self, name: str) -> None:
        """Check that a file holds exactly the tensors that the index places in it.

        Raises:
            CheckpointError: It does not.
        """
        expected: dict[str, Expected] = {}
        for tensor, entry in self.index.items():
            for held in entry.slices:
                if held.file == name:
                    width = DTYPES[entry.dtype].itemsize
                    expected[held.key_for(tensor)] = Expected(entry.dtype, width, held.shape)
        check_header(self.files[name], expected)

    def files_for(self, wanted: Iterable[tuple[str, LocalPart]]) -> set[str]:
        """Return the names of the files that hold some element of the wanted parts."""
        return {
            held.file
            for name, part in wanted
            for held in self.entry(name, part.global_shape, part.data.dtype).slices
            if intersection(held.offset, held.shape, part.offset, tuple(part.data.shape))
        }

    def entry(self, name: str, shape: Extent, dtype: torch.dtype) -> TensorEntry:
        """Return a tensor's entry after checking that it is what the caller expects."""
        entry = self.index.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name}: missing from the checkpoint")
        if entry.shape != shape or entry.dtype != DTYPE_NAMES[dtype]:
            raise CheckpointError(
                f"tensor {name}: the checkpoint holds {entry.dtype} {list(entry.shape)}, the "
                "model needs "
                f"{DTYPE_NAMES[dtype]} {list(shape)}; resume with the configuration it was saved "
                "under"
            )
        return entry

    def read_into(self, name: str, part: LocalPart) -> None:
        """Fill one local part, in place, from every slice that intersects it."""
        shape = tuple(part.data.shape)
        for held in self.entry(name, part.global_shape, part.data.dtype).slices:
            shared = intersection(held.offset, held.shape, part.offset, shape)
            if shared is None:
                continue
            source = self.read_box(held, name, shared)
            part.data[box(shared, part.offset)].copy_(source)

    def read_box(self, held: Slice, name: str, shared: tuple[Extent, Extent]) -> torch.Tensor:
        """Return one box of a stored slice; only its bytes are read."""
        with safe_open(self.files[held.file], framework="pt") as file:
            key = held.key_for(name)
            if not shared[0]:
                return file.get_tensor(key)
            return file.get_slice(key)[box(shared, held.offset)]

    def read_whole(self, name: str) -> torch.Tensor:
        """Return one whole tensor on the CPU."""
        entry = self.index[name]
        whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.read_into(name, LocalPart(whole, (0,) * whole.ndim, entry.shape, owned=False))
        return whole


def box(shared: tuple[Extent, Extent], origin: Extent) -> tuple[slice, ...]:
    """Return the index of a shared box inside an array that begins at `origin`."""
    offset, shape = shared
    return tuple(
        slice(start - first, start - first + size)
        for start, first, size in zip(offset, origin, shape, strict=True)
    )
