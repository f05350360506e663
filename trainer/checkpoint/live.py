"""The tensors of a run's state where they live, and how they are read piece by piece.

A checkpoint holds the same bytes whoever keeps the state: fp32 masters and moments in slabs on the
host or on the device, weights that are their own master, a master in two planes. `Live` names one
such tensor and who changes it; `Source` is this rank's part of it, from which any run of elements
can be read, and whose stamp tells whether somebody has changed it.
"""

from dataclasses import dataclass

import torch

from interlace.kernels.update import merge_master
from interlace.offload.subgroup import Member, SubgroupState, version_of
from interlace.offload.watched import Watched
from interlace.trainer.checkpoint.tensors import LocalPart, Placed, local_part

SMALL_BYTES = 64 * 2**10
"""Tensors up to this size are copied when a snapshot is taken: that costs less than the book."""


@dataclass(frozen=True)
class Fragment:
    """Which part of a tensor some memory is, where the tensor itself does not tell.

    Attributes:
        offset: Where it begins in the whole tensor.
        global_shape: Of the whole tensor.
        number: Of several fragments of one tensor on one rank, from 0.
        ranks: Ranks that hold about equally much of all such tensors.
    """

    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    number: int
    ranks: int


@dataclass(frozen=True)
class Live:
    """One tensor of the state, or a fragment of one.

    Attributes:
        name: Canonical, of the whole tensor.
        tensor: The memory itself, plain or a `DTensor`; of a split master its high plane.
        remainder: The other plane of a split master, this rank's elements, 1-D.
        owner: Who announces that it changes, its subgroup for one; None for everything else.
        member: The parameter that it belongs to, where there is one.
        frozen: Nobody changes it while training.
        fragment: Where `tensor` is this rank's fragment, of which no other rank has anything.
    """

    name: str
    tensor: torch.Tensor
    remainder: torch.Tensor | None = None
    owner: Watched | None = None
    member: Member | None = None
    frozen: bool = False
    fragment: Fragment | None = None

    @property
    def key(self) -> str:
        """Its name, unique among everything that a rank has."""
        number = self.fragment.number if self.fragment else 0
        return f"{self.name}#{number}" if number else self.name

    def part(self, tensor: torch.Tensor, rank: int) -> LocalPart:
        """Return this rank's part of it, where `tensor` is what `whole` returned."""
        if self.fragment is None:
            return local_part(tensor, rank)
        where = self.fragment
        return LocalPart(tensor.detach(), where.offset, where.global_shape, owned=True)

    @property
    def dtype(self) -> torch.dtype:
        """As a checkpoint holds it."""
        return self.tensor.dtype if self.remainder is None else torch.float32

    @property
    def global_bytes(self) -> int:
        """Size of the whole tensor in a checkpoint; of fragments, their share of all ranks'."""
        ranks = 1 if self.fragment is None else self.fragment.ranks
        return self.tensor.numel() * self.dtype.itemsize * ranks

    def whole(self) -> torch.Tensor:
        """Return the tensor, a view of live memory; of a split master a copy."""
        if self.remainder is None:
            return self.tensor
        assert isinstance(self.owner, SubgroupState)
        assert self.member is not None
        return self.member.shaped(self.owner.master_of(self.member).view(-1))


@dataclass(frozen=True, eq=False)
class Source:
    """This rank's part of one tensor, as a snapshot reads it.

    Attributes:
        name: Canonical.
        key: Under which a file holds it.
        placed: What a file holds of it.
        memory: The part's elements, 1-D: live memory or a copy; of a split master its high plane.
        remainder: The other plane of a split master.
        live: What it is of, where `memory` is live; None for a copy.
        begun: The stamp when the snapshot was taken.
    """

    name: str
    key: str
    placed: Placed
    memory: torch.Tensor
    remainder: torch.Tensor | None
    live: Live | None
    begun: tuple[int, int]

    @classmethod
    def of(cls, live: Live, rank: int) -> "Source | None":
        """Return this rank's part of a tensor, or None if another rank stores it."""
        part = live.part(live.tensor, rank)
        if not part.owned:
            return None
        memory = part.data.reshape(-1)
        changes = live.owner is None and not live.frozen
        copied = changes or memory.numel() * live.dtype.itemsize <= SMALL_BYTES
        remainder = live.remainder
        if copied:
            memory, remainder = read(memory, remainder).clone(), None
        return cls(
            name=live.name,
            key=live.key,
            placed=Placed(
                live.name, live.dtype, tuple(part.data.shape), part.offset, part.global_shape
            ),
            memory=memory,
            remainder=remainder,
            live=None if copied else live,
            begun=stamp_of(live),
        )

    @property
    def is_read_in_place(self) -> bool:
        """Whether `read` returns live memory: then it must not change until it is used."""
        return self.live is not None and self.remainder is None and not self.memory.is_cuda

    @property
    def intact(self) -> bool:
        """Whether nobody has begun to change it since the snapshot."""
        return self.live is None or stamp_of(self.live) == self.begun

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements on the host, 1-D: a view of the memory where that is possible."""
        remainder = None if self.remainder is None else self.remainder[start:stop]
        return read(self.memory[start:stop], remainder)


def read(memory: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """Return elements on the host, from one plane or from two; complete when this returns."""
    if remainder is None:
        return memory.cpu()
    return merge_master(memory.cpu(), remainder.cpu())


def stamp_of(live: Live) -> tuple[int, int]:
    """Return numbers that change once somebody begins to change a tensor: the version of its
    owner, and torch's count of writes to it.
    """
    version = live.owner.version if live.owner is not None else 0
    # An update counts as a write to weights only after it, and not to slabs.
    return version, version_of(live.tensor)
