"""Host and device memory of optimizer state: how much there is, and slabs of exactly the size
needed.

torch's pinned allocations round up to powers of two (up to twice the memory asked for); a slab here
is an anonymous mapping of whole pages, first touched by the threads that will use it (so that its
pages lie on their NUMA node), and then registered with CUDA.
"""

import mmap
from pathlib import Path
from typing import Any

import torch

from interlace.offload.hardware import host_memory_bytes
from interlace.offload.lanes import CpuPool
from interlace.offload.schedule import MemoryShortage

HOST_SHARE = 0.9
"""Share of the available host memory that is used when no budget is given."""


def available_host_bytes() -> int:
    """Return the host memory that could be allocated now without swapping, in bytes.

    The smaller of what the kernel calls available and what this process' control group leaves.
    """
    available = host_memory_bytes()
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    limit, used = (read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        available = min(available, limit - used)
    return available


def read_number(path: str) -> int | None:
    """Return the number that a kernel file holds, or None if it has none."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available_device_bytes(device: torch.device) -> int:
    """Return the device memory that could be allocated now, torch's own reserve included."""
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserved


class HostSlabs:
    """Hands out host memory for state, and takes it back.

    Args:
        pool: Threads that touch, and will later use, the memory.
        pin: Register the memory with CUDA, so that copies run beside everything else.
    """

    def __init__(self, pool: CpuPool, pin: bool) -> None:
        self.pool = pool
        self.pin = pin

    def empty(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a 1-D tensor of zeros in exactly as many pages as it needs."""
        size = elements * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype)
        pages = mmap.mmap(-1, size)
        slab = torch.frombuffer(pages, dtype=dtype, count=elements)

        def touch(start: int, stop: int) -> None:
            slab[start:stop].zero_()

        self.pool.over_range(elements, touch)
        if self.pin:
            register(slab)
        return slab

    def release(self, slab: torch.Tensor) -> None:
        """Unpin a slab that is about to be dropped; memory that is not ours is left alone."""
        if self.pin and slab.device.type == "cpu" and slab.numel():
            runtime().cudaHostUnregister(slab.data_ptr())


def register(slab: torch.Tensor) -> None:
    """Pin a slab for CUDA copies until `HostSlabs.release`.

    Raises:
        MemoryShortage: The system refuses to pin so much.
    """
    size = slab.numel() * slab.element_size()
    status = int(runtime().cudaHostRegister(slab.data_ptr(), size, 0))
    if status != 0:
        raise MemoryShortage(
            f"the system refuses to pin {size:,} bytes of host memory (CUDA status {status}); "
            "raise the limit (`ulimit -l unlimited`) or lower offload.host_budget_gib"
        )


def runtime() -> Any:
    """Return the bindings of the CUDA runtime."""
    bindings = torch.cuda.cudart()
    assert bindings is not None, "without CUDA nothing is pinned"
    return bindings
