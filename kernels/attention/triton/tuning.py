"""Tile sizes of the attention kernels, from a table per architecture.

A table and not a search at run time: another tile rounds in another order, so whatever chooses tiles
anew in every process gives other bits in every process. `benchmarks/attention.py --tune` measures
this machine's and keeps them for later processes.
"""

import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Whether kernels run in Triton's interpreter, as decided when they were imported."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut up.

    Attributes:
        rows: Queries of a tile.
        columns: Keys of a tile.
        warps: Warps of a program.
        stages: Loads in flight.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


INTERPRETER = Tile(32, 32)


def tile_for(kernel: str, q: torch.Tensor) -> Tile:
    """Return the tile of a kernel for queries like `q`."""
    return INTERPRETER
