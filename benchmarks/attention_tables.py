"""What `benchmarks/attention.py` writes besides its results: the tiles of this GPU, rows for the
table by which back ends are chosen, and where the time of a pass goes.
"""

import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from attention_contenders import (
    PASSES,
    Contender,
    Pass,
    Shape,
    build_ours,
    make_inputs,
    prepare,
)
from attention_measuring import Bench, Measured, Place

from interlace.kernels.attention.backends import BACKENDS
from interlace.kernels.attention.measurements import Row, merge_rows
from interlace.kernels.attention.request import architecture

KERNELS: dict[str, Pass] = {
    "forward_kernel": "forward",
    "backward_rows_kernel": "backward",
    "backward_columns_kernel": "backward",
    "tangent_kernel": "double backward",
    "double_backward_rows_kernel": "double backward",
    "double_backward_columns_kernel": "double backward",
}
"""Kernel to a pass that runs it, in 16 bits."""


def typical(place: Place, width: int) -> Shape:
    """Return the most important shape of a head width."""
    return next(each for each in place.shapes() if each.width == width and each.causal)


def tune(bench: Bench) -> list[str]:
    """Measure tiles of every kernel in turn, keep the fastest, and say what was found.

    Causal attention in 16 bits, head widths 128 and 64. The shipped tile of a place is the first of
    its candidates.
    """
    # Triton need not be there to run the rest of the benchmark.
    tuning: Any = import_module("interlace.kernels.attention.triton.tuning")
    device = torch.device(bench.place.device)
    here = architecture(device)
    lines: list[str] = []
    for width in (128, 64):
        shape = typical(bench.place, width)
        inputs = make_inputs(shape, bench.place.device, bench.place.dtype)
        for kernel, which in KERNELS.items():
            if bench.budget.spent:
                return [
                    *lines,
                    f"the budget of time left out {kernel}, width {width}, and the rest",
                ]
            step = prepare(which, build_ours(shape, "triton", 2), inputs)
            where = tuning.Place(kernel, "half", width)
            choices = tuning.candidates(where, here)
            times = tile_times(bench, kernel, choices, step)
            tile, taken = min(times.items(), key=lambda pair: pair[1])
            path = tuning.keep(here, {where: tuning.Measured(tile, taken * 1e3)})
            shipped = times.get(choices[0])
            gain = "the shipped one does not run" if shipped is None else f"{shipped / taken:.2f}"
            lines.append(
                f"{kernel}, width {width}: {tile}, {taken * 1e3:.3g} ms; times as fast as the "
                f"shipped tile: {gain}; {len(times)} of {len(choices)} run; kept in {path}"
            )
    return lines


def tile_times(
    bench: Bench, kernel: str, choices: Sequence[Any], step: Callable[[], object]
) -> dict[Any, float]:
    """Return the median seconds of a kernel with each tile that runs."""
    times: dict[Any, list[float]] = {tile: [] for tile in choices}
    for _ in range(bench.rounds + 1):
        for tile in list(times):
            try:
                with cut_as(bench, kernel, tile, times[tile]):
                    step()
            except Exception as error:
                # Too large for this GPU, as a rule.
                print(f"{kernel}: {tile} does not run: {type(error).__name__}: {error}")
                del times[tile]
    # The first round compiles.
    return {tile: statistics.median(taken[1:]) for tile, taken in times.items()}


@contextmanager
def cut_as(bench: Bench, kernel: str, tile: Any, taken: list[float]) -> Generator[None]:
    """Give one kernel a tile, and note the seconds that its launches take."""
    launch: Any = import_module("interlace.kernels.attention.triton.launch")
    tile_for, run = launch.tile_for, launch.Call.run

    def chosen(name: str, q: torch.Tensor) -> Any:
        return tile if name == kernel else tile_for(name, q)

    def timed(call: Any, function: Any, *rest: Any, **options: Any) -> None:
        if function.__name__ != kernel:
            run(call, function, *rest, **options)
        else:
            taken.append(bench.timed(lambda: run(call, function, *rest, **options), 1))

    with patch.object(launch, "tile_for", chosen), patch.object(launch.Call, "run", timed):
        yield


def router_contenders(place: Place) -> list[Contender]:
    """Return the project's back ends by name, but for the one that is chosen only by name."""
    return [
        Contender(
            name,
            1 if backend.order == 1 else 2,
            lambda shape, name=name, order=1 if backend.order == 1 else 2: build_ours(
                shape, name, order
            ),
        )
        for name, backend in BACKENDS.items()
        if name != "reference" and not (place.device == "cpu" and name in ("triton", "flex"))
    ]


def measured_rows(bench: Bench) -> list[str]:
    """Measure the back ends that calls can be routed to, merge the rows, and say what was done."""
    rows = rows_for_the_router(bench.measure(), bench.place)
    paths = merge_rows(rows)
    return [
        *(f"{row.named()}: {row.milliseconds}" for row in rows),
        *bench.errors,
        f"{len(rows)} rows in {', '.join(map(str, paths))}",
    ]


def rows_for_the_router(found: Measured, place: Place) -> list[Row]:
    """Return one row per shape and kind of work, times of everyone who has all its passes."""
    here = architecture(torch.device(place.device))
    name = torch.cuda.get_device_name() if place.device == "cuda" else "this CPU"
    rows: list[Row] = []
    for shape in dict.fromkeys(shape for _, shape in found):
        for work, passes in (("forward+backward", PASSES[:2]), ("double_backward", PASSES)):
            cells = [found[which, shape] for which in passes]
            times = {
                each: sum(1e3 * statistics.median(cell[each].seconds) for cell in cells)
                for each in cells[0]
                if all(cell[each].seconds for cell in cells)
            }
            if times:
                row = {
                    "architecture": here,
                    "dtype": str(place.dtype).removeprefix("torch."),
                    "head_width": shape.width,
                    "length": shape.length,
                    "mask": "causal" if shape.causal else "none",
                    "pass": work,
                    "milliseconds": times,
                    "source": f"benchmarks/attention.py --table on {name}, torch "
                    f"{torch.__version__}, {shape.batch} x {shape.heads} heads",
                }
                rows.append(Row.model_validate(row))
    return rows


def profile(place: Place, everyone: Sequence[Contender]) -> str:
    """Return tables of what each contender's passes spend their time on, at the typical shape."""
    shape = typical(place, 128)
    inputs = make_inputs(shape, place.device, place.dtype)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    words = f"{shape.batch} x {shape.heads} heads of {shape.width}, {shape.mask}, {shape.length}"
    parts = [f"# Where the time of attention goes\n\n{words}, {place.dtype}\n"]
    for contender in everyone:
        for which in PASSES:
            if not contender.can(which):
                continue
            try:
                step = prepare(which, contender.build(shape), inputs)
                step()
                with torch.profiler.profile(activities=activities) as profiler:
                    step()
                    if place.device == "cuda":
                        torch.cuda.synchronize()
            except Exception as error:
                parts.append(f"## {contender.name}, {which}\n\n{type(error).__name__}: {error}\n")
                continue
            order = f"self_{place.device}_time_total"
            text = profiler.key_averages().table(
                sort_by=order, row_limit=12, max_name_column_width=70
            )
            lines = "\n".join(line.rstrip() for line in text.splitlines())
            parts.append(f"## {contender.name}, {which}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)
