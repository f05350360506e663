"""What every home asks of every lane: seconds per parameter, and for whole subgroups.

All are seconds that a lane needs at least, whatever the order of events; `simulator` adds what
only the order shows. With duplex efficiency e both copy directions run at e times their rate while
both are busy; then any schedule takes at least up + (1/e - 1) down, and the same with both
exchanged. A staged subgroup occupies a slot while it is copied in, updated and copied out, so the
slots are a lane too, which works on as many subgroups at once as there are slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from interlace.offload.fit import device_bytes, host_bytes
from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.schedule import Footprint, HiddenWindow, Home, Subgroup

HOMES = (Home.RESIDENT, Home.STAGED, Home.HOST)
RESIDENT, STAGED, HOST = range(3)
LOADED: tuple[str, ...] = ("h2d", "d2h", "cpu", "device", "dram", "slots")

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
"""Homes of subgroups as positions in `HOMES`."""


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds that one parameter's pieces take alone; by home, in the order of `HOMES`.

    Attributes:
        copy_in: State to the device.
        weights: Weights to the device.
        copy_out: State to the host.
        cpu: Update on the host.
        device: Update on the device.
        dram: Its share of the node's memory rate.
        flush: Its gradient to the host.
    """

    copy_in: tuple[float, float, float]
    weights: tuple[float, float, float]
    copy_out: tuple[float, float, float]
    cpu: tuple[float, float, float]
    device: tuple[float, float, float]
    dram: tuple[float, float, float]
    flush: tuple[float, float, float]


def rates_of(profile: HardwareProfile) -> OffloadRates:
    """Return the rates of a profile; `ValueError` if it has none."""
    if profile.rates is None:
        raise ValueError(
            f"the profile {profile.name or profile.device_name} has no copy and update rates; "
            "measure them with `interlace profile`"
        )
    return profile.rates


def work_of(rates: OffloadRates, footprint: Footprint, overhead: float = 0.0) -> Work:
    """Return what one parameter asks of the lanes, with its share of a piece's overhead."""
    up, down = rates.h2d_bytes_per_second, rates.d2h_bytes_per_second
    entering, leaving, weight = footprint.copied_in, footprint.staged_copy, footprint.weight
    device = footprint.device_update / rates.device_update_bytes_per_second + overhead
    cpu = footprint.host_update / rates.cpu_update_bytes_per_second + overhead
    memory = rates.host_dram_bytes_per_second / rates.ranks_per_node
    on_host = footprint.host_dram - footprint.gradient
    flush = footprint.gradient_copy / down
    return Work(
        copy_in=(0.0, entering / up + overhead, 0.0),
        weights=(0.0, 0.0, weight / up + overhead),
        copy_out=(0.0, leaving / down + overhead, 0.0),
        cpu=(0.0, 0.0, cpu),
        device=(device, device, 0.0),
        dram=(0.0, footprint.staged_dram / memory, on_host / memory),
        flush=(0.0, flush if footprint.gradient_with_state else 0.0, flush),
    )


def lane_loads(work: Work, duplex: float, slots: int) -> list[tuple[float, ...]]:
    """Return seconds of each lane of `LOADED` by home."""
    drag = 1.0 / duplex - 1.0
    up = [a + b for a, b in zip(work.copy_in, work.weights, strict=True)]
    down = work.copy_out
    passing = work.copy_in[STAGED] + work.device[STAGED] + work.copy_out[STAGED]
    return [
        tuple(a + drag * b for a, b in zip(up, down, strict=True)),
        tuple(b + drag * a for a, b in zip(up, down, strict=True)),
        work.cpu,
        work.device,
        work.dram,
        (0.0, passing / slots, 0.0),
    ]


class Loads:
    """The loads and memory of whole subgroups with every home, as arrays.

    Attributes:
        seconds: By subgroup, home and lane of `LOADED`.
        flush: Seconds of the gradient's way to the host, by subgroup and home.
        memory: Bytes on device and host, by subgroup and home; slots not counted.
        slot: Bytes of a slot, by subgroup.
        kinds: Number of the footprint, by subgroup.
        elements: By subgroup.
    """

    def __init__(
        self,
        rates: OffloadRates,
        subgroups: Sequence[Subgroup],
        window: HiddenWindow,
        slots: int,
    ) -> None:
        footprints = list(dict.fromkeys(subgroup.footprint for subgroup in subgroups))
        number = {footprint: n for n, footprint in enumerate(footprints)}
        self.subgroups, self.slots = subgroups, slots
        self.flush_window = window.flush
        self.kinds = np.array([number[s.footprint] for s in subgroups], dtype=np.int64)
        self.elements = np.array([s.elements for s in subgroups], dtype=np.float64)
        works = [work_of(rates, footprint) for footprint in footprints]
        lanes = np.array([lane_loads(w, rates.duplex_efficiency, slots) for w in works])
        flush = np.array([w.flush for w in works])
        size = self.elements[:, None]
        self.seconds: Floats = size[:, :, None] * lanes.transpose(0, 2, 1)[self.kinds]
        self.seconds += overhead_of(rates, slots)
        self.flush: Floats = size * flush[self.kinds]
        memory = np.array(
            [[(device_bytes(f, home), host_bytes(f, home)) for home in HOMES] for f in footprints],
            dtype=np.float64,
        )
        self.memory: Floats = size[:, :, None] * memory[self.kinds]
        copies = np.array([float(f.copied_in) for f in footprints])
        self.slot: Floats = self.elements * copies[self.kinds]

    def totals(self, homes: Codes) -> tuple[Floats, float, Floats]:
        """Return the lanes' seconds, the flush's and the memory of homes."""
        rows = np.arange(len(homes))
        return (
            self.seconds[rows, homes].sum(axis=0),
            float(self.flush[rows, homes].sum()),
            self.memory[rows, homes].sum(axis=0),
        )

    def needs(self, homes: Codes) -> tuple[float, float]:
        """Return bytes on device and host, the slots included."""
        device, host = self.memory[np.arange(len(homes)), homes].sum(axis=0).tolist()
        return device + self.slots * float(np.where(homes == STAGED, self.slot, 0.0).max()), host

    def late(self, flush: Floats) -> Floats:
        """Return the seconds of flushes that backward does not hide."""
        return np.maximum(0.0, flush - self.flush_window)

    def least_seconds(self, homes: Codes) -> float:
        """Return the seconds below which an update with these homes cannot go."""
        lanes, flush, _ = self.totals(homes)
        return float(lanes.max() + self.late(np.array(flush)))


def overhead_of(rates: OffloadRates, slots: int) -> Floats:
    """Return the overhead of one subgroup's pieces, by home and lane of `LOADED`."""
    one = rates.piece_overhead_seconds
    work = Work(
        copy_in=(0.0, one, 0.0),
        weights=(0.0, 0.0, one),
        copy_out=(0.0, one, 0.0),
        cpu=(0.0, 0.0, one),
        device=(one, one, 0.0),
        dram=(0.0, 0.0, 0.0),
        flush=(0.0, 0.0, 0.0),
    )
    return np.array(lane_loads(work, rates.duplex_efficiency, slots)).T
