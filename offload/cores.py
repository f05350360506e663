"""Cores and threads of a rank: one account of who has which.

Launchers start one process per GPU, often with one thread each and sometimes bound to one core; an
update on the host then takes ten times as long. Each rank gets its own part of the cores near its
GPU (`bind_rank`), and threads of its own for updates on them (`CpuPool`). Memory follows: a page
lies on the NUMA node of the core that first touches it, which is one of the rank's.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SPARED_CORES = 2
"""Cores of a rank with a GPU that updates leave alone: for Python, and for the lanes' threads."""

HOST_CORES = "INTERLACE_HOST_CORES"
"""Set by a launcher: the cores that it may use, which are for the ranks it starts and no others."""

OWN_CORES = "INTERLACE_RANK_CORES"
"""Set by `bind_rank`, for what this process starts: the cores that are this rank's alone."""


class CpuPool:
    """Threads of our own for updates on the host, bound to cores.

    Launchers set `OMP_NUM_THREADS=1` for every rank and libraries obey; these threads do not ask
    it.

    Args:
        threads: Number of threads; None means one for every core of the rank's share.
        cores: Cores to bind them to, one each; None means the rank's share of the machine.
        device: The device whose NUMA node is near.
    """

    def __init__(
        self,
        threads: int | None = None,
        cores: Collection[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        share = CoreShare(tuple(sorted(cores)), 1) if cores is not None else core_share(device)
        self.threads = threads or max(1, len(share.cores) // share.ranks)
        self._homes = deque(
            {share.cores[number % len(share.cores)]} if share.ranks == 1 else set(share.cores)
            for number in range(self.threads)
        )
        self._pool = ThreadPoolExecutor(self.threads, "cpu-update", initializer=self._bind)

    def _bind(self) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self._homes.popleft())

    def over_range(self, elements: int, work: Callable[[int, int], object]) -> None:
        """Call `work(start, stop)` on every thread's share of `range(elements)` and wait.

        Shares are the same for the same number of elements, so that the thread that first touches
        memory is the one that uses it. Cuts fall on multiples of 64 elements: no two threads write
        one cache line.
        """
        if elements == 0:
            return
        share = -(-elements // (self.threads * 64)) * 64
        parts = [
            self._pool.submit(work, start, min(start + share, elements))
            for start in range(0, elements, share)
        ]
        for part in parts:
            part.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


@dataclass(frozen=True)
class CoreShare:
    """Cores for one rank's updates.

    Attributes:
        cores: Their numbers.
        ranks: Ranks that use the same cores; 1 means that they are this rank's own.
    """

    cores: tuple[int, ...]
    ranks: int


def core_share(device: torch.device | None) -> CoreShare:
    """Return this rank's cores: those near its GPU, divided among the ranks whose GPUs are near the
    same ones.

    Where somebody else has restricted the process (a launcher that binds ranks, a container) nobody
    knows whether other ranks have the same cores: then they count as shared, and the operating
    system places the threads.
    """
    ranks, usable = local_ranks(), usable_cores()
    if ranks == 1:
        return CoreShare(spared(sorted(near(device, usable)), device), 1)
    if written_in(OWN_CORES) == usable:
        return CoreShare(spared(sorted(usable), device), 1)
    if not divisible(usable, ranks):
        return CoreShare(tuple(sorted(usable)), ranks)
    return CoreShare(spared(divided(usable, ranks, local_rank(), device), device), 1)


def bind_rank(device: torch.device | None) -> None:
    """Bind this process, if it is one of several ranks of a host, to its own part of the cores, the
    first two of which updates spare on a GPU; does nothing where `core_share` would not divide
    them. Threads that torch starts later, and processes, stay on these cores.
    """
    ranks, usable = local_ranks(), usable_cores()
    if ranks == 1 or written_in(OWN_CORES) == usable or not divisible(usable, ranks):
        return
    if hasattr(os, "sched_setaffinity"):
        mine = divided(usable, ranks, local_rank(), device)
        os.sched_setaffinity(0, mine)
        os.environ[OWN_CORES] = core_list(mine)


def divisible(usable: set[int], ranks: int) -> bool:
    """Whether these cores are known to be for the ranks of this host together: all there are, or
    those of the launcher that started them.
    """
    whole = len(usable) >= (os.cpu_count() or 1) or written_in(HOST_CORES) == usable
    return whole and len(usable) >= ranks


def written_in(variable: str) -> set[int]:
    """Return the cores that an environment variable lists; none if it is not set."""
    return parse_core_list(os.environ.get(variable, ""))


def core_list(cores: Collection[int]) -> str:
    """Return cores as `parse_core_list` reads them."""
    return ",".join(str(core) for core in sorted(cores))


def divided(usable: set[int], ranks: int, rank: int, device: torch.device | None) -> list[int]:
    """Return one rank's part of a host's cores; two ranks never get the same core."""
    homes = [usable] * ranks
    if device is not None and device.type == "cuda" and torch.cuda.device_count() >= ranks:
        homes = [near(torch.device("cuda", number), usable) for number in range(ranks)]
        if any(a != b and a & b for a in homes for b in homes):
            homes = [usable] * ranks
    neighbours = [number for number in range(ranks) if homes[number] == homes[rank]]
    cores = sorted(homes[rank])
    size, place = len(cores) // len(neighbours), neighbours.index(rank)
    # Fewer cores than ranks near a GPU: better anywhere than none.
    return cores[place * size : (place + 1) * size] or sorted(usable)


def spared(cores: Sequence[int], device: torch.device | None) -> tuple[int, ...]:
    """Return a rank's cores for updates: with a GPU some are left to who issues its work, since the
    slowest thread decides when an update is done.
    """
    busy = SPARED_CORES if device is not None and device.type == "cuda" else 0
    return tuple(cores[busy:] if len(cores) > 4 * busy else cores)


def near(device: torch.device | None, usable: set[int]) -> set[int]:
    """Return the usable cores of a GPU's NUMA node; all where there is none."""
    if device is None or device.type != "cuda":
        return usable
    facts = torch.cuda.get_device_properties(device)
    place = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    try:
        text = Path(f"/sys/bus/pci/devices/{place}/local_cpulist").read_text(encoding="ascii")
    except OSError:
        return usable
    return (usable & parse_core_list(text)) or usable


def parse_core_list(text: str) -> set[int]:
    """Read the kernel's form of a set of cores: `0-3,8,10-11`."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def local_rank() -> int:
    """Return which of the ranks of this host this is, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """Return how many ranks share this host, from the launcher's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> set[int]:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))
