"""Any run of elements as boxes, and checkpoints whose tensors were cut anywhere."""

import itertools
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import train_here

from interlace.trainer.checkpoint.boxes import boxes_of
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.live import Live, Source
from interlace.trainer.checkpoint.tensors import (
    Slice,
    TensorIndex,
    TensorReader,
    box,
    index_of,
    merge_indexes,
    overlap,
    parse_index,
    safetensors_head,
)
from interlace.trainer.engines.zero.engine import fragments

Cut = tuple[int, ...]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Cut, int, int]:
    """A shape, and a run of its elements."""
    shape = draw(shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(runs())
def test_boxes_are_the_run_in_its_order(run: tuple[Cut, int, int]) -> None:
    shape, start, stop = run
    numbered = torch.arange(prod(shape)).view(shape)
    boxes = boxes_of(shape, start, stop)
    held = [numbered[box((each.offset, each.shape), (0,) * len(shape))] for each in boxes]
    assert [each.shape for each in held] == [torch.Size(each.shape) for each in boxes]
    elements = list(itertools.chain(*(each.flatten().tolist() for each in held)))
    assert elements == list(range(start, stop))
    assert all(each.elements > 0 for each in boxes)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@st.composite
def some_slices(draw: st.DrawFn) -> list[Slice]:
    """A few boxes of one tensor, anywhere."""
    dimensions = draw(st.integers(0, 3))
    extents = st.lists(st.integers(0, 3), min_size=dimensions, max_size=dimensions).map(tuple)
    one = st.builds(Slice, file=st.just("file"), offset=extents, shape=extents)
    return draw(st.lists(one, max_size=6))


@given(some_slices())
def test_slices_that_share_an_element_are_found(slices: list[Slice]) -> None:
    def elements(one: Slice) -> set[Cut]:
        ranges = [range(a, a + n) for a, n in zip(one.offset, one.shape, strict=True)]
        return set(itertools.product(*ranges))

    pairs = itertools.combinations(slices, 2)
    assert overlap(slices) == any(elements(one) & elements(other) for one, other in pairs)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, Cut, Cut]:
    """A shape, and two ways to cut its elements in runs."""
    shape = draw(shapes)
    ends = st.lists(st.integers(0, prod(shape)), max_size=4).map(sorted).map(tuple)
    return shape, draw(ends), draw(ends)


def parts_of(whole: torch.Tensor, ends: Cut) -> list[list[Live]]:
    """Return what each of some ranks has of a tensor that is cut at these places."""
    places = (0, *ends, whole.numel())
    return [
        fragments("t", whole.view(-1)[a:b], tuple(whole.shape), a, len(places) - 1, None)
        for a, b in itertools.pairwise(places)
    ]


def written(lives: Sequence[Live], rank: int, folder: Path) -> tuple[TensorIndex, Path]:
    """Write what one rank has, as a save does; return the index of its file."""
    sources = [source for live in lives if (source := Source.of(live, rank)) is not None]
    placed = {source.key: source.placed for source in sources}
    path = folder / f"rank-{rank}"
    contents = [bytes(each.read(0, each.memory.numel()).numpy().tobytes()) for each in sources]
    path.write_bytes(safetensors_head(placed) + b"".join(contents))
    return index_of(path.name, placed), path


@settings(deadline=None)
@given(cuts())
def test_what_was_cut_one_way_is_read_in_any_other(
    tmp_path_factory: pytest.TempPathFactory, cut: tuple[Cut, Cut, Cut]
) -> None:
    shape, saved, loaded = cut
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.randn(shape)
    files = [written(lives, rank, folder) for rank, lives in enumerate(parts_of(whole, saved))]
    index = merge_indexes([index for index, _ in files])
    # A rank that reads knows the manifest as text.
    document = {
        name: entry.model_dump(mode="json", exclude_none=True) for name, entry in index.items()
    }
    reader = TensorReader(parse_index(json.loads(json.dumps(document))), dict_of(files))
    if whole.numel():
        assert torch.equal(reader.read_whole("t"), whole)
    again = torch.full(shape, torch.nan)
    for rank, lives in enumerate(parts_of(again, loaded)):
        for live in lives:
            reader.read_into(live.name, live.part(live.whole(), rank))
    assert torch.equal(again, whole)


def dict_of(files: Sequence[tuple[TensorIndex, Path]]) -> dict[str, Path]:
    """Return the paths of files by name."""
    return {path.name: path for _, path in files}


def test_a_file_checks_its_boxes_under_their_own_keys(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    lives = parts_of(whole, (4, 20))[1]
    assert [live.key for live in lives] == ["t", "t#1", "t#2"]
    index, path = written(lives, 0, tmp_path)
    keys = [held.key for held in index["t"].slices]
    assert keys == [None, "t#1", "t#2"]
    TensorReader(index, {path.name: path}).check_file(path.name)


def test_manifests_of_whole_tensors_have_no_keys_and_older_ones_are_read(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(tiny, run, "train.steps=1", "train.validate_every_steps=0")
    manifest = CheckpointStore(run / "checkpoints").read_manifest(1)
    slices = [held for entry in manifest.payload["tensors"].values() for held in entry["slices"]]
    # What an older release reads, which knows no other keys.
    assert {key for held in slices for key in held} == {"file", "offset", "shape"}
    assert all(
        held.key_for(name) == name
        for name, entry in parse_index(manifest.payload["tensors"]).items()
        for held in entry.slices
    )
