"""Whether a safetensors file holds what the index says, asked before the library reads it.

The file begins with the length of its header in eight bytes (little-endian) and the header itself,
JSON that gives every tensor a dtype, a shape and a range of the bytes behind it. A digest finds
damage; whoever can write the folder can make a digest that fits, so what a header may claim is
bounded here by what the index leads to expect: a length beyond that is refused before anything is
allocated for it, and ranges that overlap, leave gaps or end elsewhere than the file does are
refused by name. The format: https://huggingface.co/docs/safetensors.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn, cast

from interlace.trainer.checkpoint.files import open_regular
from interlace.trainer.errors import CheckpointError

_LENGTH_BYTES = 8
_ENTRY_BYTES = 256
"""Room for everything in a header's entry that is neither the name nor the shape."""

_NUMBER_BYTES = 22
"""Room for one number of a shape."""


@dataclass(frozen=True)
class Expected:
    """One tensor that a file must hold: safetensors dtype name, bytes per element, shape."""

    dtype: str
    width: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return prod(self.shape) * self.width


def check_header(path: Path, expected: Mapping[str, Expected]) -> None:
    """Do nothing if a safetensors file holds exactly these tensors, one behind the other.

    Reads the header only.

    Raises:
        CheckpointError: It does not, or cannot be read; names the file and what is wrong.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            most = _most_bytes(expected)
            if length > min(most, size - _LENGTH_BYTES):
                _refuse(
                    path,
                    f"claims {length:,} bytes; a file of {size:,} bytes that holds "
                    f"{len(expected):,} tensors has at most {most:,}",
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from error
    ranges = [
        _range_of(path, name, entry, expected) for name, entry in _entries(path, text).items()
    ]
    if len(ranges) != len(expected):
        _refuse(path, f"describes {len(ranges):,} tensors, the index {len(expected):,}")
    position = 0
    for start, stop, name in sorted(ranges):
        if start != position:
            _refuse(path, f"begins tensor {name} at byte {start:,} instead of {position:,}")
        position = stop
    if _LENGTH_BYTES + length + position != size:
        _refuse(path, f"accounts for {_LENGTH_BYTES + length + position:,} of {size:,} bytes")


def _most_bytes(expected: Mapping[str, Expected]) -> int:
    # A character of a name takes six bytes where it is escaped.
    return _ENTRY_BYTES + sum(
        6 * len(name.encode()) + _ENTRY_BYTES + _NUMBER_BYTES * len(entry.shape)
        for name, entry in expected.items()
    )


def _entries(path: Path, text: bytes) -> Mapping[str, object]:
    try:
        document = cast(object, json.loads(text))
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError) as error:
        _refuse(path, f"is not JSON ({error})")
    if not isinstance(document, dict):
        _refuse(path, "is not a JSON object")
    return cast(Mapping[str, object], document)


def _range_of(
    path: Path, name: str, entry: object, expected: Mapping[str, Expected]
) -> tuple[int, int, str]:
    """Return where a tensor's bytes begin and end, after checking all else that is said of it."""
    wanted = expected.get(name)
    if wanted is None:
        _refuse(path, f"describes {name!r}, which the index does not place in this file")
    said = cast(Mapping[str, object], entry) if isinstance(entry, dict) else {}
    if said.get("dtype") != wanted.dtype or said.get("shape") != list(wanted.shape):
        _refuse(
            path,
            f"says that tensor {name} is {said.get('dtype')} {said.get('shape')}, the index says "
            f"{wanted.dtype} {list(wanted.shape)}",
        )
    offsets = said.get("data_offsets")
    start, stop = _two_numbers(offsets)
    if stop - start != wanted.bytes:
        _refuse(path, f"gives tensor {name} the bytes {offsets}, not {wanted.bytes:,} of them")
    return start, stop, name


def _two_numbers(value: object) -> tuple[int, int]:
    """Return a pair of whole numbers; of anything else, a pair that no range has."""
    match value:
        case [int(start), int(stop)]:
            return start, stop
        case _:
            return 0, -1


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path}: its header {reason}. Nothing was loaded from it.")
