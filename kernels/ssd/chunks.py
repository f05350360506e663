"""Where chunks begin and end when no chunk may span two documents.

A kernel that works on one chunk at a time looks its rows up in a table. Every document is cut from
its own first position, so its numbers do not depend on what it is packed with, and no kernel needs
a mask for documents (the layout of `chunk_indices` in flash-linear-attention). Rows are positions
of the batch laid end to end, B * T of them.
"""

import functools
import weakref
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ChunkTable:
    """Chunks of all documents, in order. All entries are int32 on the device of the batch."""

    start: torch.Tensor
    """(M,) first row of each chunk."""

    length: torch.Tensor
    """(M,) rows of each chunk, 1 to Q."""

    first_chunk: torch.Tensor
    """(documents,) first chunk of each document."""

    chunk_count: torch.Tensor
    """(documents,) chunks of each document."""

    begins: torch.Tensor
    """(documents,) row of the batch that the document is the first of, or -1: it takes that row's
    initial state."""

    ends: torch.Tensor
    """(documents,) row of the batch that the document is the last of, or -1: its last state is that
    row's final state."""


def number_documents(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, T) int32 numbers that grow by one wherever the id changes, from 0 in each row."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.nn.functional.pad(changed.cumsum(1, dtype=torch.int32), (1, 0))


def chunk_table(
    batch: int, length: int, chunk: int, segment_ids: torch.Tensor | None, device: torch.device
) -> ChunkTable:
    """Return the table of a batch of `batch` rows of `length` positions.

    Args:
        batch: Rows of the batch.
        length: Positions of each row, at least one.
        chunk: Most positions of a chunk, Q.
        segment_ids: (batch, length) integers; a document ends where the id changes. None makes
            every row one document. Waits for the device once per tensor: the table is kept for the
            next layer.
        device: Where the table is needed.
    """
    if segment_ids is None:
        return uniform_table(batch, length, chunk, device)
    kept = RECENT.get(segment_ids, chunk)
    if kept is None:
        first = torch.ones(batch, 1, dtype=torch.bool, device=device)
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = torch.cat([first, changed], dim=1).flatten().nonzero().squeeze(1)
        kept = table_of(starts, batch, length, chunk)
        RECENT.put(segment_ids, chunk, kept)
    return kept


@functools.lru_cache(maxsize=8)
def uniform_table(batch: int, length: int, chunk: int, device: torch.device) -> ChunkTable:
    """Return the table of rows that are one document each."""
    return table_of(torch.arange(batch, device=device) * length, batch, length, chunk)


def table_of(starts: torch.Tensor, batch: int, length: int, chunk: int) -> ChunkTable:
    """Return the table of documents that begin at the rows `starts` (documents,) int64."""
    stops = torch.cat([starts[1:], starts.new_tensor([batch * length])])
    counts = (stops - starts + chunk - 1) // chunk
    first_chunk = counts.cumsum(0) - counts
    total = int(counts.sum())
    document = torch.repeat_interleave(counts, output_size=total)
    within = torch.arange(total, device=starts.device) - first_chunk[document]
    start = starts[document] + within * chunk
    row = starts // length
    columns = {
        "start": start,
        "length": (stops[document] - start).clamp(max=chunk),
        "first_chunk": first_chunk,
        "chunk_count": counts,
        "begins": torch.where(starts % length == 0, row, -1),
        "ends": torch.where(stops % length == 0, row, -1),
    }
    return ChunkTable(**{name: values.int() for name, values in columns.items()})


class Recent:
    """The last table that was made from a tensor of segments, as long as the tensor lives and is
    not written to.
    """

    def __init__(self) -> None:
        self.source: weakref.ref[torch.Tensor] | None = None
        self.key = (0, 0)
        self.table: ChunkTable | None = None

    def get(self, segment_ids: torch.Tensor, chunk: int) -> ChunkTable | None:
        """Return the table of these very segments, or None."""
        same = self.source is not None and self.source() is segment_ids
        return self.table if same and self.key == (segment_ids._version, chunk) else None

    def put(self, segment_ids: torch.Tensor, chunk: int, table: ChunkTable) -> None:
        """Keep a table."""
        self.source, self.table = weakref.ref(segment_ids), table
        self.key = (segment_ids._version, chunk)


RECENT = Recent()
