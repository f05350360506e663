"""Every Triton kernel compiles for the GPUs it is meant for, with the tiles that are shipped: into
the shared memory there is, and without moving spilled registers in loops. No GPU is needed.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).resolve().parents[1] / "cases"
NO_ASSEMBLER = 3
SHARED = {80: 163 * 1024, 90: 227 * 1024}
ATTENTION = {
    "forward_kernel",
    "tangent_kernel",
    "backward_rows_kernel",
    "backward_columns_kernel",
    "double_backward_rows_kernel",
    "double_backward_columns_kernel",
}


def compiled(folder: Path, capability: int, case: str, *words: str) -> list[dict[str, Any]]:
    """Return what kernels take, compiled anew: nothing is read from Triton's cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / case)
    command = [sys.executable, str(CASES / "gpu_compiler.py"), str(capability), case, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == NO_ASSEMBLER:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_the_kernels_of_attention_compile_for_an_h100(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        plain, everything = pool.map(
            lambda case: compiled(tmp_path, 90, case, "bfloat16", "64"),
            ("attention", "everything"),
        )
    assert {taken["kernel"] for taken in plain} == ATTENTION
    assert {taken["kernel"] for taken in everything} == ATTENTION
    assert [taken for taken in plain if taken["spilled_in_loops"]] == []
    # Soft cap, ALiBi, segments and a block-sparse mask at once cost some registers more.
    assert [taken for taken in everything if taken["spilled_in_loops"] > 100] == []
    assert [taken for taken in plain + everything if taken["shared"] > SHARED[90]] == []


@pytest.mark.long
@pytest.mark.parametrize("case", ["attention", "everything"])
@pytest.mark.parametrize("width", ["16", "64", "128", "256"])
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_compiles_for_every_dtype_and_head_width(
    capability: int, dtype: str, width: str, case: str, tmp_path: Path
) -> None:
    taken = compiled(tmp_path, capability, case, dtype, width)
    assert {each["kernel"] for each in taken} == ATTENTION
    assert [each for each in taken if each["shared"] > SHARED[capability]] == []


@pytest.mark.parametrize(
    ("capability", "dtype", "case"),
    [
        (90, "bfloat16", "scan"),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in product((80, 90), ("bfloat16", "float32"), ("scan", "updates"))
            if each != (90, "bfloat16", "scan")
        ),
    ],
)
def test_all_other_kernels_compile(capability: int, dtype: str, case: str, tmp_path: Path) -> None:
    taken = compiled(tmp_path, capability, case, dtype, "64")
    assert len({each["kernel"] for each in taken}) >= 3
    assert [each for each in taken if each["spilled_in_loops"]] == []
    assert [each for each in taken if each["shared"] > SHARED[capability]] == []
