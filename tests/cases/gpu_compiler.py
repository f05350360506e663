"""Compiles Triton kernels for a GPU that need not be there, and says what they take of it.

The ordinary launchers run on tensors of the CPU; launches compile and stop there. In a process of
its own, since where tests run kernels in Triton's interpreter nothing can be compiled:

    python tests/cases/gpu_compiler.py 90 attention bfloat16 64

prints one line of JSON per kernel. Words after the head width give another tile than that of the
table: rows=64 columns=64 warps=4 stages=2.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from slab_cases import FORMS, RULES, a_step, make_slab
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from interlace.kernels.attention.scoring import Scoring

Tensor = torch.Tensor

NO_ASSEMBLER = 3
"""Exit status where this build of Triton brings no assembler."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one compiled kernel takes.

    Attributes:
        kernel: Its name.
        registers: Per thread.
        spills: Bytes per thread that the assembler put into memory anywhere.
        spilled_in_loops: Instructions of innermost loops that move such bytes: those that cost.
        shared: Bytes of shared memory per program.
        seconds: Of compilation.
    """

    kernel: str
    registers: int
    spills: int
    spilled_in_loops: int
    shared: int
    seconds: float


class PretendedGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(
    capability: int, done: Callable[[Taken, Any], None], only: str | None = None
) -> Iterator[None]:
    """Compile kernels instead of launching them inside; Triton keeps the pretended GPU after it.

    What Triton has compiled before, in this process or its cache, is not reported again.

    Args:
        capability: Compute capability of the GPU: 90.
        done: Is given what a kernel takes, and the kernel as Triton compiled it.
        only: Name of the kernel to compile; others are passed over.
    """
    launch = JITFunction.run

    def compile_only(kernel: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if only not in (None, kernel.__name__):
            return
        start = time.perf_counter()
        with redirect_stdout(StringIO()) as said:
            compiled = launch(kernel, *values, grid=grid, warmup=True, **options)
        seconds = time.perf_counter() - start
        registers = re.findall(r"Used (\d+) registers", said.getvalue())
        if not registers:
            return  # The assembler said nothing: it has been compiled before.
        spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said.getvalue())))
        taken = Taken(
            kernel=kernel.__name__,
            registers=int(registers[-1]),
            spills=spills,
            spilled_in_loops=spilled_in_loops(compiled.asm["cubin"]) if spills else 0,
            shared=compiled.metadata.shared,
            seconds=round(seconds, 1),
        )
        done(taken, compiled)

    driver.set_active(PretendedGPU(capability))
    knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def spilled_in_loops(binary: bytes) -> int:
    """Return how many instructions of innermost loops load or store spilled registers.

    What is kept for the end, or computed once and looked up between loops, costs next to nothing.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [Path(get_ptxas(80).path).with_name("nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    jumps = ((re.search(r"BRA\s.*`\((\.L_\S+)\)", line), end) for end, line in enumerate(code))
    loops = [(labels[to[1]], end) for to, end in jumps if to and labels[to[1]] < end]
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end for a, b in loops if (a, b) != (start, end))
    ]
    return sum(
        bool(re.search(r"\b(?:STL|LDL)\b", line))
        for start, end in innermost
        for line in code[start : end + 1]
    )


def attention(dtype: torch.dtype, width: int, scoring: Scoring) -> None:
    """Launch every kernel of attention once."""
    from interlace.kernels.attention.triton import backward, double_backward, forward, tangent

    q, k = torch.empty(1, 8, 1024, width, dtype=dtype), torch.empty(1, 4, 1024, width, dtype=dtype)
    lse = torch.empty(1, 8, 1024)
    forward(q, k, k, scoring)
    backward(q, k, k, q, lse, q, None, scoring)
    double_backward(q, k, k, q, lse, q, None, q, q, k, k, scoring)
    if dtype == torch.float32:
        # With 16 bits it has been part of the double backward.
        tangent(q, k, k, q, lse, q, k, k, scoring)


CAUSAL = Scoring(scale=0.125, left=2048, right=0)


def everything() -> Scoring:
    """Return a scoring with every feature at once."""
    places = torch.arange(1024, dtype=torch.int32)[None]
    segments = places // 300
    return Scoring(
        scale=0.125,
        left=2048,
        right=0,
        softcap=30.0,
        slopes=torch.ones(8),
        diagonal=places,
        first=segments * 300,
        last=places + 1,
        query_segments=segments,
        key_segments=segments,
        kinds=torch.zeros(1, 1, 8, 8, dtype=torch.int32),
        pairs=torch.ones(1, 128, 128, dtype=torch.bool),
    )


def scan(dtype: torch.dtype, width: int) -> None:
    """Launch every kernel of the scan and of the causal convolution, with all options."""
    from interlace.kernels.conv1d import launch as conv1d
    from interlace.kernels.ssd import launch as ssd

    x, keys = torch.zeros(2, 512, 8, width, dtype=dtype), torch.zeros(2, 512, 2, 128, dtype=dtype)
    dt, decay, skip = torch.rand(2, 512, 8), -torch.rand(8), torch.rand(8, width)
    segments = (torch.arange(512) // 100).expand(2, -1)
    start = torch.zeros(2, 8, width, 128)
    problem = ssd.Problem(x, dt, decay, keys, keys, skip, segments, 256)
    ssd.run_forward(problem, start)
    ssd.run_backward(problem, start, x, start)
    channels, taps = x.flatten(2), torch.rand(8 * width, 4)
    state = torch.zeros(2, 3, 8 * width, dtype=dtype)
    convolution = conv1d.Problem(channels, taps, taps[:, 0], segments.int(), state, True)
    conv1d.run_forward(convolution)
    conv1d.run_backward(convolution, channels)


def updates() -> None:
    """Launch the kernels of the optimizer for slabs of every form."""
    from interlace.kernels.update.gpu import sum_of_squares_on_gpu, update_on_gpu

    for rule in RULES.values():
        for form in FORMS:
            slab = make_slab(form, rule, 5000)
            update_on_gpu(rule, slab, a_step(rule), 0)
            sum_of_squares_on_gpu(slab.gradient)


def main(capability: int, case: str, dtype: str, width: int, *tile: str) -> None:
    """Compile what a case launches, and print what it takes."""
    from interlace.kernels.attention.triton import launch, tuning

    # Tensors of a CPU stand in for those of the GPU.
    tuning.architecture_of = lambda device: f"sm{capability}"
    if tile:
        sizes = {name: int(size) for name, size in (word.split("=") for word in tile)}
        launch.tile_for = lambda kernel, q: tuning.Tile(**sizes)
    cases: dict[str, Callable[[], None]] = {
        "attention": lambda: attention(getattr(torch, dtype), width, CAUSAL),
        "everything": lambda: attention(getattr(torch, dtype), width, everything()),
        "scan": lambda: scan(getattr(torch, dtype), width),
        "updates": updates,
    }
    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")
        dtype = "float32"
    with compiling_for(capability, lambda taken, _: print(json.dumps(asdict(taken)), flush=True)):
        cases[case]()


if __name__ == "__main__":
    try:
        get_ptxas(80), get_ptxas(90)
    except RuntimeError as error:
        print(error)
        sys.exit(NO_ASSEMBLER)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
