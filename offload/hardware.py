"""What this machine can do: memory sizes and the peak rate of matrix products.

The rate is the denominator of MFU. For well-known GPUs it is the vendor's dense bf16 figure; on a
CPU, and on GPUs that the table does not know, it is measured here, so that MFU means "share of the
best matrix product this machine showed". Memory sizes come from the driver and the kernel; nothing
runs at import.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 matrix FLOP/s by a part of the device name, from the vendor's data sheets; the longest
matching name counts."""


@dataclass(frozen=True)
class HardwareProfile:
    """One rank's share of a machine.

    Attributes:
        device_name: Model name of the accelerator, or `CPU`.
        matmul_flops: Peak FLOP/s of a matrix product in the compute dtype.
        device_memory_bytes: Memory of the accelerator; the host's own where there is none.
        host_memory_bytes: Physical memory of the host.
    """

    device_name: str
    matmul_flops: float
    device_memory_bytes: int
    host_memory_bytes: int


def profile_hardware(device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    """Look at (and, where no figure is published, measure) one device; takes less than a second."""
    host = host_memory_bytes()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = [name for name in PEAK_BF16_FLOPS if name in properties.name]
        published = (
            PEAK_BF16_FLOPS[max(known, key=len)] if known and dtype is torch.bfloat16 else None
        )
        rate = published or measure_matmul_flops(device, dtype)
        return HardwareProfile(properties.name, rate, properties.total_memory, host)
    return HardwareProfile("CPU", measure_matmul_flops(device, dtype), host, host)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, trials: int = 20) -> float:
    """Return the best FLOP/s of `trials` square matrix products."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(trials + 1):  # the first one warms up and never wins
        start = time.perf_counter()
        torch.matmul(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def host_memory_bytes() -> int:
    """Return the physical memory of this host in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return the host memory this process occupies now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
