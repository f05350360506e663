"""How `benchmarks/attention.py` measures: where, which shapes, in which order, in rounds."""

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from attention_contenders import (
    CUDNN,
    FLASH,
    MATH,
    OURS,
    PASSES,
    Attend,
    Contender,
    Inputs,
    Pass,
    Shape,
    Step,
    make_inputs,
    prepare,
)
from results import Row

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Place:
    """What differs between a GPU and a CPU.

    Attributes:
        device: `cuda` or `cpu`.
        dtype: Of queries, keys and values.
        tokens: Of every shape.
        hidden: Of every shape.
        lengths: The most important first.
        memory_lengths: Where memory is shown to be linear; the last is four times the first.
        budget: Seconds by default.
        rounds: By default.
        unit: Of rates, and how many FLOP/s it is.
        goals: Pass, whom it is measured by, length (0 for every), and the goal for the ratio.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    lengths: tuple[int, ...]
    memory_lengths: tuple[int, ...]
    budget: float
    rounds: int
    unit: tuple[str, float]
    goals: tuple[tuple[Pass, str, int, float], ...]

    def shapes(self) -> list[Shape]:
        """Return every shape, the most important first."""
        return [
            Shape(tokens=self.tokens, hidden=self.hidden, length=n, width=width, causal=causal)
            for n, width, causal in product(self.lengths, (128, 64), (True, False))
        ]


GPU = Place(
    device="cuda",
    dtype=torch.bfloat16,
    tokens=16_384,
    hidden=2048,
    lengths=(4096, 16_384, 1024, 8192, 2048),
    memory_lengths=(16_384, 32_768, 65_536),
    budget=400.0,
    rounds=5,
    unit=("TFLOP/s", 1e12),
    goals=(
        ("forward", FLASH, 0, 1.0),
        ("backward", FLASH, 0, 1.0),
        ("forward", CUDNN, 0, 0.75),
        ("backward", CUDNN, 0, 0.75),
        ("double backward", MATH, 4096, 3.0),
    ),
)
CPU = Place(
    device="cpu",
    dtype=torch.float32,
    tokens=2048,
    hidden=256,
    lengths=(2048, 512, 1024),
    memory_lengths=(1024, 2048, 4096),
    budget=150.0,
    rounds=3,
    unit=("GFLOP/s", 1e9),
    goals=(),
)


@dataclass
class Cell:
    """One contender in one pass of one shape.

    Attributes:
        seconds: Of one call, a figure per round.
        peak: Bytes at most in use, beyond the inputs.
        problem: Why there is nothing, in a word or two, or None.
    """

    seconds: list[float] = field(default_factory=list[float])
    peak: int = 0
    problem: str | None = None


Key = tuple[Pass, Shape]
Measured = dict[Key, dict[str, Cell]]


class Budget:
    """Seconds that may be spent."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return time.monotonic() > self.end


class Bench:
    """Measures on one device.

    Attributes:
        place: The device.
        rounds: Figures per contender and pass.
        budget: Of the whole.
        everyone: Who takes part.
        errors: Message of each failure to where it was met.
    """

    def __init__(
        self, place: Place, rounds: int, budget: Budget, everyone: Sequence[Contender]
    ) -> None:
        self.place, self.rounds, self.budget, self.everyone = place, rounds, budget, everyone
        self.errors: dict[str, list[str]] = {}

    def measure(self) -> Measured:
        """Measure all shapes as far as the budget goes."""
        found: Measured = {}
        for shape in self.place.shapes():
            if self.budget.spent:
                break
            inputs = make_inputs(shape, self.place.device, self.place.dtype)
            functions = dict(self.built(shape))
            for which in PASSES:
                found[which, shape] = self.cells(which, shape, functions, inputs)
        return found

    def built(self, shape: Shape) -> Iterator[tuple[str, Attend | Exception]]:
        """Yield each contender's function, or why there is none."""
        for contender in self.everyone:
            try:
                yield contender.name, contender.build(shape)
            except Exception as error:
                yield contender.name, error

    def cells(
        self, which: Pass, shape: Shape, functions: Mapping[str, Attend | Exception], inputs: Inputs
    ) -> dict[str, Cell]:
        """Measure one pass of one shape in rounds."""
        cells: dict[str, Cell] = {}
        running: dict[str, tuple[Step, int]] = {}
        for contender in self.everyone:
            if not contender.can(which):
                cells[contender.name] = Cell(problem="first order")
            elif self.budget.spent:
                cells[contender.name] = Cell(problem="out of time")
            else:
                cell, ready = self.warmed_up(contender, which, shape, functions, inputs)
                cells[contender.name] = cell
                if ready is not None:
                    running[contender.name] = ready
        for _ in range(self.rounds):
            for name, (step, repeat) in running.items():
                cells[name].seconds.append(self.timed(step, repeat))
        running.clear()
        self.free()
        return cells

    def warmed_up(
        self,
        contender: Contender,
        which: Pass,
        shape: Shape,
        functions: Mapping[str, Attend | Exception],
        inputs: Inputs,
    ) -> tuple[Cell, tuple[Step, int] | None]:
        """Return a contender's peak of memory, its step, and how often a round repeats it."""
        try:
            attend = functions[contender.name]
            if isinstance(attend, Exception):
                raise attend
            if self.place.device == "cuda":
                # The first call compiles; what that takes is not the pass's own.
                prepare(which, attend, inputs)()
            step, peak = self.peak_of(which, attend, inputs)
            # A hundredth of a second is long beside a launch.
            repeat = round(0.01 / self.timed(step, 1)) if self.place.device == "cuda" else 1
            return Cell(peak=peak), (step, min(50, max(1, repeat)))
        except torch.OutOfMemoryError:
            problem = "out of memory"
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            words = f"{contender.name}: {type(error).__name__}: {first_line}"
            where = f"{which}, width {shape.width}, {shape.mask}, {shape.length}"
            self.errors.setdefault(words, []).append(where)
            problem = "failed"
        self.free()
        return Cell(problem=problem), None

    def peak_of(self, which: Pass, attend: Attend, inputs: Inputs) -> tuple[Step, int]:
        """Return a prepared step and the memory that it and all before it took."""
        if self.place.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step = prepare(which, attend, inputs)
            step()
            return step, torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            step = prepare(which, attend, inputs)
            step()
        recorded: Any = profiler.profiler
        used = most = 0
        for event in recorded.kineto_results.events():
            if event.name() == "[memory]":
                used += event.nbytes()
                most = max(most, used)
        return step, most

    def timed(self, step: Step, repeat: int) -> float:
        """Return the seconds of one call, over some in a row; on a CPU those of the processor."""
        if self.place.device != "cuda":
            start = time.process_time()
            for _ in range(repeat):
                step()
            return (time.process_time() - start) / repeat
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(repeat):
            step()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / repeat

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.place.device == "cuda":
            torch.cuda.empty_cache()

    def matmul_rate(self) -> float:
        """Return the FLOP/s of the machine's own product of large matrices."""
        size = 8192 if self.place.device == "cuda" else 1024
        a, b = (torch.randn(size, size).to(self.place.device, self.place.dtype) for _ in range(2))
        taken = [self.timed(lambda: a @ b, 3) for _ in range(3 + self.rounds)]
        return 2.0 * size**3 / statistics.median(taken[3:])

    def memory_rows(self) -> list[Row]:
        """Return peaks of all three passes at growing lengths, ours and math's."""
        rows: list[Row] = []
        for length in self.place.memory_lengths:
            shape = Shape(tokens=length, hidden=64, length=length, width=64, causal=True)
            inputs = make_inputs(shape, self.place.device, self.place.dtype)
            row: dict[str, object] = {"pass": "all three", "width": 64, "mask": "causal, one head"}
            row["length"] = length
            for contender in self.everyone:
                if contender.name in (OURS, MATH):
                    functions = {contender.name: contender.build(shape)}
                    cell, _ = self.warmed_up(contender, "double backward", shape, functions, inputs)
                    row[f"{contender.name} MiB"] = cell.problem or cell.peak / MIB
            rows.append(row)
        return rows
