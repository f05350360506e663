"""Attention: forward, backward and double backward next to everyone else's, and memory.

On a GPU in bfloat16, 16k tokens, hidden width 2048 (FlashAttention-2's shapes): our Triton kernels
beside torch's cuDNN, flash and math back ends, FlexAttention, the flash-attn package where there is
one, and the machine's own product of matrices. On a CPU in float32, small shapes, one thread and
its processor time, which neighbours disturb least: our slices in plain torch beside torch's flash
and math. Contenders take turns in one process; medians count; who cannot run is listed with its
error. `attention_contenders.py` says what counts as a FLOP. Peak memory is that of everything from
the inputs to the end of the pass, the inputs not counted.

    python benchmarks/attention.py [--rounds N] [--budget SECONDS] [--save] [--profile]
    python benchmarks/attention.py --tune     this GPU's tiles, kept for later processes
    python benchmarks/attention.py --table    rows for the table by which back ends are chosen

Shapes are measured in order of importance, length 4k first on a GPU; what the budget does not allow
is left out, and said. `--profile` adds a table of kernels, which says where a pass spends its time.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attention_contenders import CUDNN, FLASH, MATH, OURS, PASSES, Shape, contenders
from attention_measuring import CPU, GPU, MIB, Bench, Budget, Cell, Key, Measured, Place
from attention_tables import measured_rows, profile, router_contenders, tune
from results import RESULTS, Row, save, table

NO_GPU = "attention: --tune needs an NVIDIA GPU, and torch finds none here"


def rate(key: Key, cell: Cell, unit: float) -> float | str:
    """Return a cell's useful FLOP/s, or why there are none."""
    which, shape = key
    return cell.problem or shape.flops(which) / statistics.median(cell.seconds) / unit


def rows_of(found: Measured, place: Place, matmul: float) -> list[Row]:
    """Return a line per pass and shape, in order of pass, width, mask and length."""
    name, unit = place.unit
    rows: list[Row] = []
    for key in sorted(found, key=lambda key: (PASSES.index(key[0]), *order_of(key[1]))):
        which, shape = key
        cells = found[key]
        row: dict[str, object] = {"pass": which, "width": shape.width, "mask": shape.mask}
        row["length"] = shape.length
        rates = {contender: rate(key, cell, unit) for contender, cell in cells.items()}
        row |= {f"{contender} {name}": each for contender, each in rates.items()}
        row |= {
            f"{OURS} / {other}": ratio
            for other in (FLASH, CUDNN, MATH)
            if (ratio := ratio_of(cells, other)) is not None
        }
        ours = rates[OURS]
        row[f"{OURS} / matmul"] = ours / (matmul / unit) if isinstance(ours, float) else ""
        row |= {
            f"{contender} MiB": cell.peak / MIB
            for contender, cell in cells.items()
            if cell.problem is None
        }
        rows.append(row)
    return rows


def order_of(shape: Shape) -> tuple[int, bool, int]:
    """Return where a shape stands in the table."""
    return shape.width, shape.causal, shape.length


def ratio_of(cells: Mapping[str, Cell], other: str) -> float | None:
    """Return how many times as fast as another ours is: the median of the rounds' ratios."""
    if other not in cells:
        return None
    pairs = list(zip(cells[OURS].seconds, cells[other].seconds, strict=False))
    return statistics.median(theirs / ours for ours, theirs in pairs) if pairs else None


def goal_notes(found: Measured, place: Place) -> list[str]:
    """Say in words which goals are met and where they are not."""
    notes: list[str] = []
    for which, other, length, goal in place.goals:
        ratios = {
            shape: ratio
            for (each, shape), cells in found.items()
            if each == which
            and length in (0, shape.length)
            and (ratio := ratio_of(cells, other)) is not None
        }
        what = f"{which}, {OURS} / {other}, goal {goal:g}" + (f" at {length}" if length else "")
        if not ratios:
            notes.append(f"{what}: NOT MEASURED")
            continue
        short = {shape: ratio for shape, ratio in ratios.items() if ratio < goal}
        middle = statistics.geometric_mean(ratios.values())
        text = f"{what}: {'MISSED' if short else 'met'}; {middle:.2f} on average of {len(ratios)}"
        if short:
            shape, least = min(short.items(), key=lambda pair: pair[1])
            text += (
                f" shapes, short of it in {len(short)}, the least {least:.2f} at width "
                f"{shape.width}, {shape.mask}, length {shape.length}"
            )
        else:
            text += f" shapes, at least {min(ratios.values()):.2f}"
        notes.append(text)
    return notes


def comparison_notes(found: Measured, place: Place) -> list[str]:
    """Say how ours compares where no goal is set."""
    notes: list[str] = []
    for which in PASSES:
        for other in (FLASH, MATH):
            ratios = [
                ratio
                for (each, _), cells in found.items()
                if each == which and (ratio := ratio_of(cells, other)) is not None
            ]
            if ratios and not place.goals:
                notes.append(
                    f"{which}: {OURS} runs at {statistics.geometric_mean(ratios):.2f} of {other}'s "
                    f"speed on average, {min(ratios):.2f} to {max(ratios):.2f}"
                )
    return notes


def growth(memory: Sequence[Row]) -> float:
    """Return how much our peak grows from the shortest to the longest, which is four times it."""
    first, last = (row[f"{OURS} MiB"] for row in (memory[0], memory[-1]))
    assert isinstance(first, float) and isinstance(last, float), "ours did not run to the end"
    return last / first


def report(bench: Bench) -> tuple[list[Row], list[str]]:
    """Measure everything; return rows and notes."""
    place = bench.place
    matmul = bench.matmul_rate()
    memory = bench.memory_rows()
    found = bench.measure()
    left_out = [shape for shape in place.shapes() if ("forward", shape) not in found]
    name, unit = place.unit
    notes = [
        f"{place.tokens:,} tokens, hidden width {place.hidden}, {str(place.dtype)[6:]}; median of "
        f"{bench.rounds} rounds; torch's own product of matrices runs at {matmul / unit:.3g} {name}"
    ]
    if place is CPU:
        load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
        notes.append(f"one thread, its processor time; load of the machine at the end: {load}")
    notes += goal_notes(found, place) + comparison_notes(found, place)
    notes.append(
        f"four times the length takes {growth(memory):.2f} times the memory (linear: 4 or less)"
    )
    notes += [
        f"{words} ({len(where)} times, first at {where[0]})"
        for words, where in bench.errors.items()
    ]
    if left_out:
        words = "; ".join(f"{s.width} {s.mask} {s.length}" for s in left_out)
        notes.append(f"the budget of time left out (width, mask, length): {words}")
    return [*rows_of(found, place, matmul), *memory], notes


def write_profile(bench: Bench, where: str) -> Path:
    """Write the table of kernels; return its file."""
    path = RESULTS / f"attention-{where}-profile.md"
    path.write_text(profile(bench.place, bench.everyone), encoding="utf-8")
    return path


def main() -> None:
    """Measure and print; fail if memory is not linear in the length."""
    place = GPU if torch.cuda.is_available() else CPU
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=place.rounds)
    parser.add_argument("--budget", type=float, default=place.budget, help="seconds, about")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/attention-*")
    parser.add_argument("--profile", action="store_true", help="write a table of kernels as well")
    parser.add_argument("--tune", action="store_true", help="measure tiles and keep the fastest")
    parser.add_argument("--table", action="store_true", help="keep rows for choosing a back end")
    arguments = parser.parse_args()
    everyone = router_contenders(place) if arguments.table else contenders(place.device)
    if place is CPU:
        torch.set_num_threads(1)
    bench = Bench(place, arguments.rounds, Budget(arguments.budget), everyone)
    if arguments.tune and place is CPU:
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    if arguments.tune:
        print("\n".join(tune(bench)))
    if arguments.table:
        print("\n".join(measured_rows(bench)))
    if arguments.tune or arguments.table:
        return
    rows, notes = report(bench)
    print(table(rows))
    print("\n".join(notes))
    where = "gpu" if place is GPU else "cpu"
    if arguments.save:
        save(f"attention-{where}", f"Attention on a {where.upper()}", rows, notes)
    if arguments.profile:
        print(f"where the time goes: {write_profile(bench, where)}")
    memory = [row for row in rows if row["pass"] == "all three"]
    assert growth(memory) < 4.4, "the memory of double backward grows faster than the length"


if __name__ == "__main__":
    main()
