"""Host and device memory of optimizer state: how much there is, and slabs of exactly the size
needed.

torch's pinned allocations round up to powers of two (up to twice the memory asked for); a slab here
is an anonymous mapping of whole pages, first touched by the threads that will use it (so that its
pages lie on their NUMA node), and then registered with CUDA.
"""

import mmap
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from interlace.offload.control_group import group_memory
from interlace.offload.cores import CpuPool
from interlace.offload.hardware import host_memory_bytes
from interlace.offload.schedule import MemoryShortage

HOST_SHARE = 0.9
"""Share of the host memory that there is which state may occupy when no budget is given."""


def available_host_bytes() -> int:
    """Return the host memory that could be allocated now without swapping, in bytes.

    The smallest of what the kernel calls available, what the control groups of this process leave
    it, and what its limit of addresses (`ulimit -v`) does.
    """
    available = host_memory_bytes()
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    left = [group.limit - group.used for group in group_memory()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        left.append(limit - pages * resource.getpagesize())
    return max(0, min(available, *left)) if left else available


def available_device_bytes(device: torch.device) -> int:
    """Return the device memory that could be allocated now, torch's own reserve included."""
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserved


class Pages(mmap.mmap):
    """Whole pages of zeros that leave the process when nobody holds them any more; pinned pages are
    unpinned first, since CUDA would go on believing in memory that is gone.
    """

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None and not sys.is_finalizing():
            runtime().cudaHostUnregister(self.pinned_at)


def pages_for(size: int) -> Pages:
    """Return so many bytes of private memory, in huge pages where the system has them: state is
    swept through from end to end, and small pages cost a sixth of the speed.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return Pages(-1, size)
    pages = Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise(pages, "MADV_HUGEPAGE")
    return pages


def advise(pages: Pages, advice: str) -> None:
    """Tell the kernel how pages are used, if it knows the word."""
    with suppress(OSError, AttributeError):
        pages.madvise(getattr(mmap, advice))


class HostSlabs:
    """Hands out host memory for state; it lasts as long as the tensor and its views.

    Args:
        pool: Threads that touch, and will later use, the memory.
        pin: Register the memory with CUDA, so that copies run beside everything else.
    """

    def __init__(self, pool: CpuPool, pin: bool) -> None:
        self.pool = pool
        self.pin = pin

    def empty(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a 1-D tensor of zeros in exactly as many pages as it needs.

        Raises:
            MemoryShortage: The system refuses to pin so much.
        """
        size = elements * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        pages = pages_for(size)
        slab = torch.frombuffer(pages, dtype=dtype, count=elements)

        # Not by torch, which would start threads of its own on every thread of the pool.
        array = slab.view(torch.uint8).numpy()

        def touch(start: int, stop: int) -> None:
            array[start * dtype.itemsize : stop * dtype.itemsize].fill(0)

        self.pool.over_range(elements, touch)
        if self.pin:
            register(pages, slab.data_ptr(), size)
        return slab


def register(pages: Pages, address: int, size: int) -> None:
    """Pin pages for CUDA copies as long as they live.

    Raises:
        MemoryShortage: The system refuses to pin so much.
    """
    status = int(runtime().cudaHostRegister(address, size, 0))
    if status != 0:
        # CUDA reports an error once more with the next launch, whoever makes it.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        raise MemoryShortage(
            f"the system refuses to pin {size:,} bytes of host memory (CUDA status {status}); "
            "raise the limit (`ulimit -l unlimited`) or lower offload.host_budget_gib"
        )
    pages.pinned_at = address
    # A forked worker must not make pinned pages move.
    advise(pages, "MADV_DONTFORK")


def runtime() -> Any:
    """Return the bindings of the CUDA runtime."""
    bindings = torch.cuda.cudart()
    assert bindings is not None, "without CUDA nothing is pinned"
    return bindings
