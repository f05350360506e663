"""Tile sizes of the attention kernels, from a table per architecture.

A table and not a search at run time: another tile rounds in another order, so whatever chooses
tiles anew in every process gives other bits in every process. The table that is shipped
(`tiles.json`) holds, for every kernel, kind of products and head width, the largest tile found that
the compiler fits into registers and shared memory; nothing in it has been timed. The benchmark,
`benchmarks/attention.py --tune`, measures `candidates` on this machine and `keep`s the fastest for
later processes, whose tiles then win.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

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


LONGEST = 256
"""Most rows or columns of a tile."""

INTERPRETER = Tile(32, 32)
"""The tile of all kernels where there is no GPU."""

Products = Literal["half", "tf32", "ieee"]
"""How tiles are multiplied: 16-bit ones, or those of fp32 as TF32 or without tensor cores."""

WIDTHS = (32, 64, 128, 256)
"""Head widths with tiles of their own; others take those of the next."""


class Place(NamedTuple):
    """What a tile is looked up by.

    Attributes:
        kernel: Name of the kernel's function.
        products: How tiles are multiplied.
        width: One of `WIDTHS`.
    """

    kernel: str
    products: Products
    width: int


class Shape(NamedTuple):
    """What a kernel holds, in tiles.

    Attributes:
        by_keys: Whether a program owns keys and walks over queries, or the other way round.
        scores: Tiles of scores in registers at once.
        sums: Sums over the walk (own length, head width) in registers.
        owned: Tensors of the own side in shared memory.
        walked: Tensors of the other side in shared memory, once per stage.
    """

    by_keys: bool
    scores: int
    sums: int
    owned: int
    walked: int


SHAPES = {
    "forward_kernel": Shape(by_keys=False, scores=1, sums=1, owned=1, walked=2),
    "tangent_kernel": Shape(by_keys=False, scores=2, sums=1, owned=2, walked=4),
    "backward_rows_kernel": Shape(by_keys=False, scores=2, sums=1, owned=2, walked=2),
    "backward_columns_kernel": Shape(by_keys=True, scores=2, sums=2, owned=2, walked=2),
    "double_backward_rows_kernel": Shape(by_keys=False, scores=4, sums=1, owned=3, walked=4),
    "double_backward_columns_kernel": Shape(by_keys=True, scores=4, sums=2, owned=4, walked=3),
}

SHARED = {"sm90": 227 * 1024, "sm80": 163 * 1024, "default": 99 * 1024}
"""Bytes of shared memory that a program may take."""

SIMILAR = {"sm87": "sm80", "sm100": "sm90", "sm103": "sm90"}
"""Architectures with the shared memory of one in the table; all others take the default."""


def tile_for(kernel: str, q: torch.Tensor) -> Tile:
    """Return the tile of a kernel for queries like `q`."""
    architecture = architecture_of(q.device)
    return INTERPRETER if architecture is None else known_tiles(architecture)[place_of(kernel, q)]


def place_of(kernel: str, q: torch.Tensor) -> Place:
    """Return what the tile of a kernel for queries like `q` is looked up by."""
    exact = torch.get_float32_matmul_precision() == "highest"
    products: Products = "half" if q.element_size() == 2 else "ieee" if exact else "tf32"
    return Place(kernel, products, next(width for width in WIDTHS if width >= q.shape[3]))


def architecture_of(device: torch.device) -> str | None:
    """Return a GPU's architecture as in `sm90`; None where kernels are interpreted."""
    if INTERPRETED or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def listed_as(architecture: str) -> str:
    """Return under which name the shipped table has an architecture."""
    return architecture if architecture in SHARED else SIMILAR.get(architecture, "default")


@cache
def known_tiles(architecture: str) -> Mapping[Place, Tile]:
    """Return the tiles of an architecture: those that are shipped, and over them those kept."""
    shipped = Path(__file__).with_name("tiles.json")
    tiles = dict(read(shipped, listed_as(architecture)))
    path = kept_path(architecture)
    return tiles | dict(read(path, architecture)) if path.is_file() else tiles


def kept_path(architecture: str) -> Path:
    """Return where the tiles measured on this machine are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "interlace" / f"attention-{architecture}.json"


def read(path: Path, architecture: str) -> Iterator[tuple[Place, Tile]]:
    """Read the tiles of one architecture from a table.

    Raises:
        ValueError: The file is not such a table; the message says what is wrong and what to type.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        for number, entry in enumerate(entries, start=1):
            problem = problem_of(entry)
            if problem is not None:
                raise ValueError(f"tile {number}: {problem}")
            if entry["architecture"] == architecture:
                place = Place(entry["kernel"], entry["products"], entry["width"])
                yield place, Tile(*(entry[key] for key in ("rows", "columns", "warps", "stages")))
    except (KeyError, TypeError, ValueError) as error:
        wrong = str(error) if type(error) is ValueError else "it is not a table of tiles"
        raise ValueError(
            f"the tile sizes of attention cannot be read from {path}: {wrong}. Measure them again: "
            f"rm {path}; python benchmarks/attention.py --tune"
        ) from error


def problem_of(entry: object) -> str | None:
    """Return what is wrong with one entry of a table, or None."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object"
    sizes = tuple(2**power for power in range(4, 9))
    allowed: dict[str, Iterable[object]] = {
        "kernel": SHAPES,
        "products": get_args(Products),
        "width": WIDTHS,
        "rows": sizes,
        "columns": sizes,
        "warps": (1, 2, 4, 8, 16),
        "stages": range(1, 9),
    }
    values = cast(dict[str, object], entry)
    for key, choices in allowed.items():
        value = values.get(key)
        if isinstance(value, bool) or value not in choices:
            return f"{key}={value!r}, but it is one of {', '.join(map(str, choices))}"
    named = isinstance(values.get("architecture"), str)
    return None if named else f"architecture={values.get('architecture')!r} is not a name"


def candidates(place: Place, architecture: str, most: int = 8) -> list[Tile]:
    """Return tiles worth measuring: the one that is shipped, and others that should fit.

    Args:
        place: The kernel, and on what.
        architecture: As in `sm90`.
        most: Number of tiles at most.
    """
    listed = listed_as(architecture)
    shipped = dict(read(Path(__file__).with_name("tiles.json"), listed))[place]
    fitting = [tile for tile in sane_tiles(place) if fits(tile, place, SHARED[listed])]
    # Larger tiles load less and wait less often.
    fitting.sort(key=lambda tile: (tile.rows * tile.columns, tile.stages), reverse=True)
    return list(dict.fromkeys([shipped, *fitting]))[:most]


def sane_tiles(place: Place) -> Iterator[Tile]:
    """Return all tiles of a reasonable shape, whether they fit or not."""
    if place.products == "ieee":
        shapes = [(own, other, warps) for own in (16, 32) for other in (16, 32) for warps in (4, 8)]
    else:
        # Four warps multiply 64 rows at a time.
        shapes = [(16 * warps, other, warps) for warps in (4, 8) for other in (16, 32, 64, 128)]
        shapes += [(128, 64, 4), (64, 32, 8), (32, 32, 4), (32, 32, 8), (32, 16, 4), (16, 16, 4)]
    for own, other, warps in shapes:
        rows, columns = (other, own) if SHAPES[place.kernel].by_keys else (own, other)
        yield from (Tile(rows, columns, warps, stages) for stages in (1, 2, 3))


def fits(tile: Tile, place: Place, shared: int) -> bool:
    """Return whether a tile should fit into registers and shared memory, roughly."""
    shape, element = SHAPES[place.kernel], 2 if place.products == "half" else 4
    own, other = tile.rows, tile.columns
    if shape.by_keys:
        own, other = other, own
    held = shape.scores * own * other + shape.sums * own * place.width
    rows = shape.owned * own + shape.walked * other * tile.stages
    # 255 registers a thread; some fifty hold addresses and numbers of rows.
    return held <= 205 * 32 * tile.warps and rows * place.width * element <= shared


class Measured(NamedTuple):
    """A tile and the milliseconds its kernel took."""

    tile: Tile
    milliseconds: float


def keep(architecture: str, fastest: Mapping[Place, Measured]) -> Path:
    """Keep the fastest tiles of this machine for later processes; return the file.

    Tiles kept before stay, where there are none of their place now.
    """
    path = kept_path(architecture)
    known: dict[Place, dict[str, object]] = {}
    if path.is_file():
        # `read` says what is wrong with a damaged file; whole entries also hold the timings.
        places = [place for place, _ in read(path, architecture)]
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        known = dict(zip(places, entries, strict=True))
    for place, (tile, milliseconds) in fastest.items():
        known[place] = {
            "architecture": architecture,
            **place._asdict(),
            **asdict(tile),
            "milliseconds": milliseconds,
        }
    lines = ",\n".join(json.dumps(known[place]) for place in sorted(known))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(f'{{"tiles": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(path)
    known_tiles.cache_clear()
    return path
