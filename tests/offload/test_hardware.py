"""What a machine can do: published rates by name, measured ones elsewhere, and its memory."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from interlace.offload import hardware
from interlace.offload.hardware import (
    PEAK_BF16_FLOPS,
    HardwareProfile,
    host_memory_bytes,
    measure_matmul_flops,
    profile_hardware,
    resident_bytes,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEASURED = 7e12


def gpu_profile(name: str, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> HardwareProfile:
    """Profile a GPU of that name; a measurement would show `MEASURED`."""
    properties = SimpleNamespace(name=name, total_memory=80 * 2**30)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(hardware, "measure_matmul_flops", lambda device, dtype: MEASURED)
    return profile_hardware(GPU, dtype)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_known_gpu_has_the_vendors_rate_of_its_longest_matching_name(
    name: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = gpu_profile(name, torch.bfloat16, monkeypatch)
    assert profile.matmul_flops == PEAK_BF16_FLOPS[known]
    assert profile.device_name == name
    assert profile.device_memory_bytes == 80 * 2**30
    assert profile.host_memory_bytes == host_memory_bytes()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("NVIDIA H100 80GB HBM3", torch.float32), ("NVIDIA Unheard Of", torch.bfloat16)],
)
def test_without_a_published_figure_the_rate_is_measured(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_profile(name, dtype, monkeypatch).matmul_flops == MEASURED


def test_a_cpu_is_measured_and_its_memory_is_the_hosts() -> None:
    profile = profile_hardware(CPU, torch.float32)
    assert profile.device_name == "CPU"
    assert profile.matmul_flops > 0
    assert profile.device_memory_bytes == profile.host_memory_bytes == host_memory_bytes()


def test_the_best_trial_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start and end of each product: 4, 1, 2 and 3 seconds.
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure_matmul_flops(CPU, torch.float32, trials=3) == 2.0 * 768**3
    assert next(clock, None) is None


def test_host_memory_is_what_the_kernel_reports() -> None:
    [line] = [
        line
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemTotal:")
    ]
    assert host_memory_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_resident_memory_grows_with_what_is_touched_not_with_what_is_reserved() -> None:
    size = 256 * 2**20
    before = resident_bytes()
    block = torch.empty(size, dtype=torch.uint8)
    assert resident_bytes() - before < 0.1 * size
    block.fill_(1)
    assert 0.9 * size < resident_bytes() - before < 1.1 * size


RACE = """
import sys, torch
from interlace.offload import measure
made = []
original = measure.measure
def counted(*given, **named):
    made.append(1)
    return original(*given, **named)
measure.measure = counted
profile = measure.known_profile(torch.device("cpu"), lambda _: None)
print(len(made), profile.rates.h2d_bytes_per_second)
"""


def test_ranks_that_start_together_measure_once(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RACE], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert sorted(words[0] for words in said) == ["0", "1"]
    assert said[0][1] == said[1][1]
