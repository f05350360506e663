"""The Triton kernels of the scan, in Triton's interpreter where there is no GPU: against the
recurrence in fp64, with NaN wherever nothing should be read and programs in any order.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ssd_cases import (
    Tensors,
    documents,
    empty_is_nan,
    largest_error,
    poisoned,
    programs_in_another_order,
    scan_inputs,
    values_and_gradients,
    with_mixed_steps,
)

from interlace.kernels import ssd
from interlace.kernels.ssd.chunks import RECENT, chunk_table, number_documents

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).resolve()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that a few positions and columns already need several."""
    from interlace.kernels.ssd import launch

    tiles = launch.Tiles(rows=16, width=16)
    monkeypatch.setattr(launch, "tiles_for", lambda *sizes: tiles)


def through_kernels(
    tensors: Tensors,
    segments: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensors:
    """Return values and gradients of the Triton back end on poisoned inputs, on the CPU."""
    by_position = ("x", "dt", "B", "C", "z")
    given = {
        name: (poisoned(t.to(dtype)) if name in by_position else t.to(dtype)).to(DEVICE)
        for name, t in tensors.items()
    }
    segments = None if segments is None else segments.to(DEVICE)
    with empty_is_nan():
        found = values_and_gradients(
            ssd, given, segment_ids=segments, return_final_states=True, backend="triton", **options
        )
    return {name: tensor.cpu() for name, tensor in found.items()}


def exactly(tensors: Tensors, segments: torch.Tensor | None) -> Tensors:
    return values_and_gradients(
        ssd, tensors, segment_ids=segments, return_final_states=True, backend="reference"
    )


CASES: dict[str, tuple[dict[str, int], str, int]] = {
    "one chunk, several tiles": ({"batch": 1, "length": 37, "heads": 2, "groups": 1}, "none", 64),
    "several chunks of tiles": ({"batch": 1, "length": 71, "heads": 2, "groups": 2}, "none", 32),
    "chunks of one tile": ({"batch": 2, "length": 19, "heads": 2, "groups": 1}, "none", 16),
    "documents across chunks": ({"batch": 2, "length": 37, "heads": 2, "groups": 1}, "long", 32),
    "documents of one position": ({"batch": 1, "length": 17, "heads": 2, "groups": 1}, "short", 16),
    "shared by three heads": ({"batch": 1, "length": 20, "heads": 6, "groups": 2}, "long", 32),
    "wide heads, more states": (
        {"batch": 1, "length": 20, "heads": 1, "groups": 1, "width": 21, "states": 18},
        "none",
        32,
    ),
    "one position": ({"batch": 2, "length": 1, "heads": 1, "groups": 1}, "none", 16),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_recurrence_with_their_gradients(name: str) -> None:
    sizes, kind, chunk = CASES[name]
    tensors = scan_inputs(**sizes)
    segments = documents(kind, sizes["batch"], sizes["length"])
    found = through_kernels(tensors, segments, chunk=chunk)
    assert largest_error(found, exactly(tensors, segments)) < (2e-6, "")


@pytest.mark.usefixtures("small_tiles")
def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE != "cpu":
        pytest.skip("only the interpreter's order can be chosen")
    tensors, segments = scan_inputs(1, 37, 2, 17, 1, 5), documents("long", 1, 37)
    straight = through_kernels(tensors, segments, chunk=32)
    for seed in (1, 2):
        with programs_in_another_order(seed):
            shuffled = through_kernels(tensors, segments, chunk=32)
        assert all(torch.equal(straight[name], shuffled[name]) for name in straight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_heads_of_a_group_are_summed_in_any_number_of_splits(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interlace.kernels.ssd import launch

    monkeypatch.setattr(launch, "PROGRAMS", programs)
    tensors = scan_inputs(1, 17, 5, 3, 1, 3, extras=False)
    found = through_kernels(tensors, None, chunk=16)
    assert largest_error(found, exactly(tensors, None)) < (2e-6, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_rounded_only_where_they_are_stored(dtype: torch.dtype) -> None:
    tensors = scan_inputs(1, 21, 2, 5, 1, 4)
    tensors.pop("z")  # The gate is a rounding of its own.
    rounded = {name: tensor.to(dtype).double() for name, tensor in tensors.items()}
    found = through_kernels(tensors, None, dtype, chunk=32)
    # On a GPU the factors of products are rounded as well.
    factor = 1 if DEVICE == "cpu" else 4
    bound = factor * 0.51 * torch.finfo(dtype).eps
    assert found["output 0"].dtype == found["d x"].dtype == dtype
    assert largest_error(found, exactly(rounded, None)) < (bound, "")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [1e-6, 100.0])
def test_kernels_bear_small_and_large_steps(scale: float) -> None:
    tensors = scan_inputs(1, 33, 2, 3, 1, 3)
    tensors["dt"] = (tensors["dt"] * scale).float().double()
    found = through_kernels(tensors, None, chunk=32)
    assert largest_error(found, exactly(tensors, None)) < (5e-6, "")


def test_decays_are_right_where_large_and_small_steps_mix() -> None:
    # Sums reach -300; without what fp32 lacks of them errors are sixty times as large.
    tensors = with_mixed_steps(scan_inputs(1, 200, 1, 2, 1, 3, seed=2))
    found = through_kernels(tensors, None)
    assert largest_error(found, exactly(tensors, None)) < (1e-6, "")


def test_packed_documents_give_the_bits_of_separate_runs() -> None:
    lengths = [1, 18, 3]
    tensors = {k: t.float().to(DEVICE) for k, t in scan_inputs(1, 22, 2, 3, 1, 3).items()}
    tensors.pop("initial_states")
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None].to(DEVICE)
    packed = ssd(**tensors, segment_ids=numbers, backend="triton", chunk=16)
    for n, piece in enumerate(packed.split(lengths, dim=1)):
        begin = sum(lengths[:n])
        part = {
            name: t[:, begin : begin + lengths[n]] if t.ndim > 2 else t
            for name, t in tensors.items()
        }
        assert torch.equal(ssd(**part, backend="triton", chunk=16), piece)


def test_no_chunk_spans_two_documents_and_every_row_is_in_one() -> None:
    for kind in ("none", "long", "short"):
        segments = documents(kind, 3, 29)
        table = chunk_table(3, 29, 4, segments, torch.device("cpu"))
        numbers = torch.zeros(3, 29) if segments is None else number_documents(segments)
        flat = [(r, int(numbers[r, t])) for r in range(3) for t in range(29)]
        rows: list[int] = []
        for start, length in zip(table.start.tolist(), table.length.tolist(), strict=True):
            assert 1 <= length <= 4
            assert len(set(flat[start : start + length])) == 1
            rows += range(start, start + length)
        assert rows == list(range(3 * 29))
        counts = zip(table.first_chunk.tolist(), table.chunk_count.tolist(), strict=True)
        for n, (first, count) in enumerate(counts):
            document = flat[int(table.start[first])]
            assert {flat[int(table.start[c])] for c in range(first, first + count)} == {document}
            row = document[0]
            assert table.begins[n] == (row if document[1] == 0 else -1)
            assert table.ends[n] == (row if document == flat[row * 29 + 28] else -1)


def test_a_table_is_kept_until_the_segments_change() -> None:
    segments = torch.tensor([[0, 0, 1, 1]])
    table = chunk_table(1, 4, 2, segments, segments.device)
    assert chunk_table(1, 4, 2, segments, segments.device) is table
    assert chunk_table(1, 4, 4, segments, segments.device) is not table
    segments[0, 1] = 1
    assert chunk_table(1, 4, 4, segments, segments.device).length.tolist() == [1, 3]
    del segments
    assert RECENT.source is not None and RECENT.source() is None
