"""The tiles of attention come from tables: one that is shipped, and one measured on the machine."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from interlace.kernels.triton_language import why_no_triton

if why_no_triton() is not None:
    pytest.skip("needs Triton", allow_module_level=True)

from interlace.kernels.attention.triton import tuning
from interlace.kernels.attention.triton.tuning import Measured, Place, Tile

PLACES = [
    Place(*parts)
    for parts in itertools.product(tuning.SHAPES, get_args(tuning.Products), tuning.WIDTHS)
]
FORWARD = Place("forward_kernel", "half", 64)
ENTRY: dict[str, Any] = {
    "architecture": "sm90",
    **FORWARD._asdict(),
    "rows": 64,
    "columns": 32,
    "warps": 4,
    "stages": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.known_tiles.cache_clear()
    return tmp_path


def on_an(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that tensors are on such a GPU."""
    monkeypatch.setattr(tuning, "architecture_of", lambda device: architecture)


@pytest.mark.parametrize("architecture", ["sm90", "sm80", "default"])
def test_the_shipped_table_has_a_tile_for_every_kernel_that_fits_its_gpu(architecture: str) -> None:
    path = Path(tuning.__file__).with_name("tiles.json")
    assert dict(tuning.read(path, architecture)).keys() == set(PLACES)
    entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    mine = [entry for entry in entries if entry["architecture"] == architecture]
    assert len(mine) == len(PLACES)
    too_large = [entry for entry in mine if (entry["shared"] or 0) > tuning.SHARED[architecture]]
    # Seven tensors of fp32 heads 256 wide do not fit into 99 KiB, however short the tile.
    allowed = {"sm90": 0, "sm80": 0, "default": 4}
    assert len(too_large) <= allowed[architecture], too_large
    assert all(entry["width"] == 256 and "double" in entry["kernel"] for entry in too_large)


@pytest.mark.parametrize(
    ("architecture", "listed"),
    [
        ("sm90", "sm90"),
        ("sm100", "sm90"),
        ("sm80", "sm80"),
        ("sm86", "default"),
        ("sm120", "default"),
    ],
)
def test_a_gpu_takes_the_tiles_of_one_with_as_much_shared_memory(
    architecture: str, listed: str
) -> None:
    assert tuning.known_tiles(architecture) == tuning.known_tiles(listed)


def test_there_is_one_tile_for_all_where_there_is_no_gpu() -> None:
    assert tuning.tile_for("forward_kernel", torch.zeros(1, 1, 1, 8)) == tuning.INTERPRETER


@pytest.mark.parametrize(
    ("dtype", "precision", "products"),
    [
        (torch.bfloat16, "highest", "half"),
        (torch.float16, "high", "half"),
        (torch.float32, "highest", "ieee"),
        (torch.float32, "high", "tf32"),
    ],
)
def test_tiles_are_looked_up_by_products_and_the_next_width(
    dtype: torch.dtype, precision: str, products: str
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for width, listed in ((1, 32), (32, 32), (33, 64), (80, 128), (256, 256)):
            q = torch.zeros(1, 1, 1, width, dtype=dtype)
            assert tuning.place_of("forward_kernel", q) == ("forward_kernel", products, listed)
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_kept_wins_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    on_an("sm90", monkeypatch)
    q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    shipped = {name: tuning.tile_for(name, q) for name in tuning.SHAPES}
    path = tuning.keep("sm90", {FORWARD: Measured(Tile(64, 32, 4, 2), 0.5)})
    tuning.keep("sm90", {FORWARD._replace(width=128): Measured(Tile(32, 16, 8, 1), 2.0)})
    assert path == cache / "interlace" / "attention-sm90.json"
    assert tuning.tile_for("forward_kernel", q) == Tile(64, 32, 4, 2)
    assert tuning.known_tiles("sm90")[FORWARD._replace(width=128)] == Tile(32, 16, 8, 1)
    del shipped["forward_kernel"]
    assert {name: tuning.tile_for(name, q) for name in shipped} == shipped
    assert [entry["milliseconds"] for entry in json.loads(path.read_text())["tiles"]] == [0.5, 2.0]
    assert list(path.parent.iterdir()) == [path]
    assert tuning.known_tiles("sm100")[FORWARD] != Tile(64, 32, 4, 2)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{", "it is not a table of tiles"),
        ("[]", "it is not a table of tiles"),
        ('{"tiles": [1]}', "tile 1: 1 is not an object"),
        (
            json.dumps({"tiles": [ENTRY, {**ENTRY, "rows": 48}]}),
            "tile 2: rows=48, but it is one of 16, 32, 64, 128, 256",
        ),
        (
            json.dumps({"tiles": [{**ENTRY, "warps": True}]}),
            "tile 1: warps=True, but it is one of 1, 2, 4, 8, 16",
        ),
        (
            json.dumps({"tiles": [{**ENTRY, "architecture": 90}]}),
            "tile 1: architecture=90 is not a name",
        ),
    ],
)
def test_a_table_that_cannot_be_read_says_what_to_type(text: str, wrong: str, cache: Path) -> None:
    path = tuning.kept_path("sm90")
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        tuning.known_tiles("sm90")
    assert str(caught.value) == (
        f"the tile sizes of attention cannot be read from {path}: {wrong}. Measure them again: "
        f"rm {path}; python benchmarks/attention.py --tune"
    )


@pytest.mark.parametrize("architecture", ["sm90", "sm80", "sm86"])
def test_candidates_are_a_handful_with_the_shipped_tile_first(architecture: str) -> None:
    for place in PLACES:
        tiles = tuning.candidates(place, architecture)
        assert tiles[0] == tuning.known_tiles(architecture)[place]
        assert 1 <= len(tiles) <= 8 and len(set(tiles)) == len(tiles)
        assert len(tiles) >= 3 or place.width == 256, place
