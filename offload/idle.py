"""State on the host that nobody uses for a while must not change: checksums of slabs between steps.

Host memory holds optimizer state for the length of a forward and backward pass, or of many where a
subgroup waits; a bit that flips there ends up in every later update. `checksums` takes a CRC32 of
every chunk of every slab on the host after an update, `changed` compares before the next one. A CRC
of 32 bits finds every flip of a single bit and misses one in four billion other changes. It runs on
the calling thread at about 1.6 GB/s, so callers do it every so many steps.
"""

import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from interlace.offload.schedule import Home
from interlace.offload.subgroup import SubgroupState

CHUNK_BYTES = 2**24
"""What one checksum is of; so closely is a change located."""


@dataclass(frozen=True)
class Checksum:
    """The checksum of one chunk of a slab.

    Attributes:
        subgroup: Its number, in the order of updates.
        slab: Its name: `master`, `remainder` or that of a moment.
        start: Where the chunk begins in the slab, in bytes.
        memory: The slab, as long as the state lives in it.
        crc: CRC32 of the bytes.
    """

    subgroup: int
    slab: str
    start: int
    memory: "weakref.ref[torch.Tensor]"
    crc: int


@dataclass(frozen=True)
class Change:
    """A chunk whose bytes are not what they were.

    Attributes:
        subgroup: As in `Checksum`.
        slab: As in `Checksum`.
        start: First byte of the chunk in the slab.
        stop: The byte after its last.
        first_element: The element of the slab that holds byte `start`.
        last_element: The element that holds the last byte.
    """

    subgroup: int
    slab: str
    start: int
    stop: int
    first_element: int
    last_element: int


def checksums(subgroups: Sequence[SubgroupState]) -> list[Checksum]:
    """Return checksums of all slabs on the host; with no work under way."""
    return [
        Checksum(subgroup.index, name, start, weakref.ref(slab), crc_of(slab, start))
        for subgroup in subgroups
        if subgroup.home is not Home.RESIDENT
        for name, slab in subgroup.slabs.items()
        for start in range(0, slab.numel() * slab.element_size(), CHUNK_BYTES)
    ]


def changed(taken: Sequence[Checksum]) -> list[Change]:
    """Return the chunks that differ from their checksums. State that has moved to other memory in
    the meantime is passed over: moving it was its use.
    """
    found: list[Change] = []
    for each in taken:
        slab = each.memory()
        if slab is None or crc_of(slab, each.start) == each.crc:
            continue
        size = slab.element_size()
        stop = min(each.start + CHUNK_BYTES, slab.numel() * size)
        elements = (each.start // size, (stop - 1) // size)
        found.append(Change(each.subgroup, each.slab, each.start, stop, *elements))
    return found


def crc_of(slab: torch.Tensor, start: int) -> int:
    """Return the CRC32 of the chunk of a slab (1-D, on the host) that begins at a byte."""
    octets = slab.view(torch.uint8)[start : start + CHUNK_BYTES]
    return zlib.crc32(octets.numpy().data)
