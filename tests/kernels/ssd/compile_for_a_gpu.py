"""Compiles every kernel of the scan and the convolution for a GPU that need not be there, and says
what each takes: python compile_for_a_gpu.py CAPABILITY DTYPE STATES.
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from interlace.kernels.conv1d import launch as conv1d
from interlace.kernels.ssd import launch as scan

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")
CAPABILITY = int(sys.argv[1])
DTYPE: torch.dtype = getattr(torch, sys.argv[2])
STATES = int(sys.argv[3])


def compile_only(kernel: Any, grid: tuple[int, ...], *values: object, **options: Any) -> None:
    """Stand in for a launch: compile, write nothing."""
    signature: dict[str, str] = {}
    for name, value in zip(kernel.arg_names, values, strict=False):
        signature[name] = NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    constants = {name: value for name, value in options.items() if name not in OPTIONS}
    signature |= dict.fromkeys(constants, "constexpr")
    # Pointers of torch's allocations are multiples of 16, and so are most strides.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, value in enumerate(values)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", CAPABILITY, 32),
        options={name: options[name] for name in OPTIONS if name in options},
    )
    print(f"{kernel.__name__:22} shared {made.metadata.shared:7}  {registers(made)}", flush=True)


def registers(made: Any) -> str:
    """Return what the assembler says of registers and spills."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        suffix = "a" if CAPABILITY >= 90 else ""
        words = ["-v", f"--gpu-name=sm_{CAPABILITY}{suffix}", "-o", "/dev/null", file.name]
        command = [get_ptxas(CAPABILITY).path, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"\d+ bytes spill stores|\d+ registers", done.stdout + done.stderr)
    return ", ".join(found) or done.stderr


scan.launch = compile_only
conv1d.launch = compile_only


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DTYPE)


def main() -> None:
    """Compile with everything: skip, documents, initial states."""
    batch, length, heads, width, groups = 2, 512, 8, 64, 2
    x, B, C = (
        randn(batch, length, heads, width),
        *(randn(batch, length, groups, STATES) for _ in range(2)),
    )
    dt, A, D = torch.rand(batch, length, heads), -torch.rand(heads), torch.rand(heads, width)
    segments = (torch.arange(length) // 100).expand(batch, -1)
    start = torch.rand(batch, heads, width, STATES)
    problem = scan.Problem(x, dt, A, B, C, D, segments, 256)
    scan.run_forward(problem, start)
    scan.run_backward(problem, start, x, start)
    channels = x.flatten(2)
    taps = torch.rand(channels.shape[2], 4)
    numbers = segments.int().contiguous()
    state = randn(batch, 3, channels.shape[2])
    conv = conv1d.Problem(channels, taps, taps[:, 0].contiguous(), numbers, state, True)
    conv1d.run_forward(conv)
    conv1d.run_backward(conv, channels)
    print("done")


if __name__ == "__main__":
    main()
