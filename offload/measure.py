"""Measures one machine for the performance model, in under a minute, and keeps the answer on disk.

Copies run as the lanes run them (pinned memory, large and small pieces, one direction and both),
updates as the executor runs them (one pass, by number of threads), host memory as a STREAM-like
copy, alone and beside copies to the device. Without a GPU the "device" is host memory too: copies
are plain ones, and the profile says so.
"""

import fcntl
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from interlace.kernels.update import AdamW, Slab, Step, update
from interlace.offload.cores import CpuPool, local_ranks, usable_cores
from interlace.offload.hardware import (
    HardwareProfile,
    OffloadRates,
    implausible,
    profile_hardware,
)
from interlace.offload.lanes import Lanes, Ticket
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Footprint

Announce = Callable[[str], None]

COPY_SIZES_MIB = (1, 16, 256)
UPDATE_ELEMENTS = 16 * 2**20
ASSUMED_COLLECTIVE = 50e9
"""Bytes per second between devices, where nothing measures it: 400 Gbit/s."""

FOOTPRINT = Footprint(weight=2, gradient=2, state=12)


def measure(device: torch.device, announce: Announce, trials: int = 5) -> HardwareProfile:
    """Measure everything; `announce` gets a line before each part."""
    # All cores that there are, whatever a launcher says of shares: the node is measured.
    pool = CpuPool(cores=usable_cores())
    try:
        return Measurement(device, pool, announce, trials).profile()
    finally:
        pool.close()


class Measurement:
    """One pass over all measurements.

    Args:
        device: The device whose copies and updates are measured.
        pool: Threads for updates on the host.
        announce: Gets a line before each part.
        trials: Repetitions of each; the median counts.
    """

    def __init__(
        self, device: torch.device, pool: CpuPool, announce: Announce, trials: int
    ) -> None:
        self.device = device
        self.pool = pool
        self.announce = announce
        self.trials = trials
        self.on_gpu = device.type == "cuda"
        self.ranks = max(1, torch.cuda.device_count()) if self.on_gpu else 1
        # A launcher that binds every rank to cores of its own lets one rank see its part alone.
        bound = local_ranks() > 1 and len(usable_cores()) < (os.cpu_count() or 1)
        self.parts = local_ranks() if bound else 1
        self.host = HostSlabs(pool, pin=self.on_gpu)
        self.details: dict[str, dict[str, float]] = {}

    def profile(self) -> HardwareProfile:
        """Return the profile, with every single figure in `measurements`."""
        self.announce("peak matrix rate")
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        quick = profile_hardware(self.device, dtype)
        self.announce("copies to the device and back, pinned, at three sizes")
        up, down = self.copies("h2d"), self.copies("d2h")
        self.announce("copies in both directions at once")
        duplex = self.duplex(up, down)
        self.announce("updates on the host by number of threads")
        cpu = self.cpu_updates()
        self.announce("updates on the device")
        on_device = self.device_update()
        self.announce("host memory, alone and beside copies")
        dram = self.host_memory()
        self.announce("hand-over from lane to lane")
        overhead = self.hand_over()
        self.announce("copies of memory that is not pinned, casts on one thread")
        rates = OffloadRates(
            ranks_per_node=self.ranks,
            h2d_bytes_per_second=up,
            d2h_bytes_per_second=down,
            duplex_efficiency=duplex,
            pageable_bytes_per_second=self.pageable(),
            # Measured with all cores, which the ranks of the node share.
            cpu_update_bytes_per_second=cpu * self.parts / self.ranks,
            piece_overhead_seconds=overhead,
            cpu_cast_elements_per_second=self.cast(),
            device_update_bytes_per_second=on_device,
            host_dram_bytes_per_second=dram * self.parts,
            collective_bytes_per_second=ASSUMED_COLLECTIVE,
            network_bytes_per_second=ASSUMED_COLLECTIVE,
        )
        what = "measured by interlace profile"
        note = "" if self.on_gpu else "; no GPU here: copies are those of host memory"
        return quick.model_copy(
            update={
                "name": platform.node(),
                "rates": rates,
                "measurements": self.details,
                "sources": {
                    "rates": f"{what} on {time.strftime('%Y-%m-%d')}{note}",
                    "collective_bytes_per_second, network_bytes_per_second": "assumed",
                },
            }
        )

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the median time of some work, the device's part included."""
        times: list[float] = []
        for _ in range(self.trials + 1):
            start = time.perf_counter()
            work()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def pair(self, mebibytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a host slab and a device tensor of so many MiB."""
        elements = mebibytes * 2**20 // 4
        return (
            self.host.empty(elements, torch.float32),
            torch.zeros(elements, device=self.device),
        )

    def copies(self, direction: str) -> float:
        """Return bytes per second of the largest copies in one direction."""
        figures: dict[str, float] = {}
        for size in COPY_SIZES_MIB:
            host, device = self.pair(size)
            target, source = (device, host) if direction == "h2d" else (host, device)

            def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
                target.copy_(source, non_blocking=True)

            figures[f"{size} MiB"] = size * 2**20 / self.seconds(copy)
        self.details[f"{direction} bytes/s by size"] = figures
        return figures[f"{COPY_SIZES_MIB[-1]} MiB"]

    def duplex(self, up: float, down: float) -> float:
        """Return each direction's rate while both run, as a share of its rate alone."""
        size = COPY_SIZES_MIB[-1]
        pairs = [self.pair(size), self.pair(size)]

        def both() -> None:
            self.at_once(
                lambda: self.on_stream(lambda: pairs[0][1].copy_(pairs[0][0], non_blocking=True)),
                lambda: self.on_stream(lambda: pairs[1][0].copy_(pairs[1][1], non_blocking=True)),
            )

        alone = size * 2**20 / min(up, down)
        share = min(1.0, max(0.51, alone / self.seconds(both)))
        self.details["duplex"] = {"share of each rate alone": share}
        return share

    def on_stream(self, work: Callable[[], object]) -> None:
        """Do work on a CUDA stream of its own and wait for it; without a GPU just do it."""
        if not self.on_gpu:
            work()
            return
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            work()
        stream.synchronize()

    def at_once(self, *works: Callable[[], None]) -> None:
        """Run several pieces of work on threads of their own."""
        threads = [threading.Thread(target=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def slab(self, device: torch.device) -> Slab:
        """Return state of the usual form: bfloat16 weights and gradients, fp32 state."""

        def make(dtype: torch.dtype) -> torch.Tensor:
            if device.type == "cpu":
                return self.host.empty(UPDATE_ELEMENTS, dtype)
            return torch.zeros(UPDATE_ELEMENTS, dtype=dtype, device=device)

        moments = (make(torch.float32), make(torch.float32))
        return Slab(make(torch.bfloat16), make(torch.float32), moments, weight=make(torch.bfloat16))

    def cpu_updates(self) -> float:
        """Return bytes per second of the update with all threads."""
        slab, rule = self.slab(torch.device("cpu")), AdamW()
        step = Step(1, 1.0, rule.hyperparameters())
        size = UPDATE_ELEMENTS * FOOTPRINT.host_update
        figures: dict[str, float] = {}
        counts = sorted({1, *(2**n for n in range(10) if 2**n < self.pool.threads)})
        for threads in [*counts, self.pool.threads]:
            pool = self.pool if threads == self.pool.threads else CpuPool(threads, usable_cores())

            def work(pool: CpuPool = pool) -> None:
                pool.over_range(
                    UPDATE_ELEMENTS, lambda a, b: update(rule, slab, step, start=a, stop=b)
                )

            figures[f"{threads} threads"] = size / self.seconds(work)
            if pool is not self.pool:
                pool.close()
        self.details["host update bytes/s by threads"] = figures
        return figures[f"{self.pool.threads} threads"]

    def device_update(self) -> float:
        """Return bytes per second of the update on the device (on one thread, without a GPU)."""
        slab, rule = self.slab(self.device), AdamW()
        step = Step(1, 1.0, rule.hyperparameters())
        size = UPDATE_ELEMENTS * FOOTPRINT.device_update
        return size / self.seconds(lambda: update(rule, slab, step))

    def host_memory(self) -> float:
        """Return bytes per second, read and written, of a copy with all threads.

        A read-mostly update may go faster than a copy; the faster of both is what memory can do.
        """
        source = self.host.empty(64 * 2**20, torch.float32)
        target = self.host.empty(64 * 2**20, torch.float32)
        to, of = target.numpy(), source.numpy()

        def copy() -> None:
            # Not by torch, which would start threads of its own on every thread of the pool.
            self.pool.over_range(to.size, lambda a, b: np.copyto(to[a:b], of[a:b]))

        size = 2 * source.numel() * 4
        alone = size / self.seconds(copy)
        host, device = self.pair(COPY_SIZES_MIB[-1])
        beside = self.seconds(
            lambda: self.at_once(
                copy, lambda: self.on_stream(lambda: device.copy_(host, non_blocking=True))
            )
        )
        self.details["host memory bytes/s"] = {
            "copy alone": alone,
            "copy beside a copy to the device": size / beside,
        }
        updates = max(self.details["host update bytes/s by threads"].values())
        return max(alone, updates)

    def hand_over(self, chains: int = 50) -> float:
        """Return the seconds that a piece of work takes when there is next to nothing to do."""
        lanes = Lanes(self.device, CpuPool(1))
        tiny, there = self.host.empty(64, torch.float32), torch.zeros(64, device=self.device)
        last: list[Ticket] = []
        start = time.perf_counter()
        for _ in range(chains):
            up = lanes.h2d.submit(
                lambda: void(there.copy_(tiny, non_blocking=True)), what="copy in", after=last
            )
            on = lanes.compute.submit(lambda: void(there.add_(1)), what="update", after=(up,))
            last = [
                lanes.d2h.submit(
                    lambda: void(tiny.copy_(there, non_blocking=True)), what="copy out", after=(on,)
                )
            ]
        last[0].wait()
        seconds = (time.perf_counter() - start) / (3 * chains)
        lanes.close()
        return seconds

    def pageable(self) -> float:
        """Return bytes per second of a copy from memory that is not pinned."""
        source = torch.zeros(64 * 2**20 // 4)
        target = torch.zeros(64 * 2**20 // 4, device=self.device)
        return 64 * 2**20 / self.seconds(lambda: void(target.copy_(source)))

    def cast(self) -> float:
        """Return elements per second that one thread widens from bfloat16 to float32."""
        source = torch.zeros(UPDATE_ELEMENTS, dtype=torch.bfloat16)
        target = torch.zeros(UPDATE_ELEMENTS)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return UPDATE_ELEMENTS / self.seconds(lambda: void(target.copy_(source)))
        finally:
            torch.set_num_threads(threads)


def void(_: object) -> None:
    """Take a result that nobody needs."""


def cache_path(device: torch.device) -> Path:
    """Return where the profile of this machine is kept: it depends on host, device and cores."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    plain = "".join(letter if letter.isalnum() else "-" for letter in name)
    cores = len(usable_cores())
    return base / "interlace" / "profiles" / f"{platform.node()}-{plain}-{cores}cores.json"


def known_profile(device: torch.device, announce: Announce) -> HardwareProfile:
    """Return this machine's profile from disk, or measure and keep it.

    A profile on disk that cannot be read, or that another version wrote, is measured again; one
    that cannot be kept is measured again the next time. Ranks that start together do not measure
    each other: the first measures, the others wait and read.
    """
    path = cache_path(device)
    with one_at_a_time(path):
        known = profile_on_disk(path, announce)
        if known is not None:
            return known
        announce(f"measuring this machine once, for {path}")
        profile = measure(device, announce, trials=3)
        try:
            keep(profile, path)
        except OSError as error:
            announce(f"{path} cannot be written ({error.strerror}); the next start measures again")
        return profile


@contextmanager
def one_at_a_time(path: Path) -> Generator[None]:
    """Let one process of this host in at a time; where the lock cannot be written, all."""
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(path.with_suffix(".lock").open("w", encoding="ascii"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def profile_on_disk(path: Path, announce: Announce) -> HardwareProfile | None:
    """Return the profile on record, or None where there is none that can be used."""
    try:
        if not path.is_file():
            return None
        profile = HardwareProfile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged, or of another version"
        announce(f"the profile on record cannot be used ({reason}): {path}")
        return None
    strange = implausible(profile)
    if strange is not None or profile.rates is None:
        announce(f"the profile on record cannot be used ({strange or 'it has no rates'}): {path}")
        return None
    return profile


def keep(profile: HardwareProfile, path: Path) -> None:
    """Write a profile; several ranks may do it at once.

    Raises:
        OSError: The folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
