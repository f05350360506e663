"""The linear program: the least time that any schedule takes, and the shares that would take it.

Lanes slow each other down, so the program divides time among the states of the machine: which of
copy in, weights, copy out and CPU update are under way. In every state the simulator's own rule
says how fast each goes; time in all states together is the time of the update, and each kind of
work must get done. The device, the staging slots, the node's memory rate, device and host memory
and the gradients that backward does not hide are rows of their own.

The simulator meets the bound within five percent for several hundred equal subgroups. It comes
least close where host memory is the limit and there are two slots: a copy that waits for memory
holds its slot meanwhile. With sizes that differ, copies wait for each other, and with few
subgroups filling and draining the lanes counts; the bound knows neither.

The slots' memory depends on the largest staged subgroup. Sizes are cut into intervals; one program
per interval may stage what is no larger and pays for slots of its smallest size.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from interlace.offload.fit import device_bytes, host_bytes, shortage
from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.loads import HOMES, STAGED, Work, rates_of, work_of
from interlace.offload.schedule import (
    NOTHING_HIDDEN,
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    Subgroup,
)
from interlace.offload.simulator import slowed

INTERVALS = 6
"""Most sizes of slots that are tried."""

KINDS: tuple[str, ...] = ("copy_in", "weights", "copy_out", "cpu")
STATES = [
    (up, down, cpu)
    for up in (None, "copy_in", "weights")
    for down, cpu in itertools.product((False, True), repeat=2)
    if up or down or cpu
]
"""What may be under way at once: a copy to the device, a copy out, a CPU update."""


@dataclass(frozen=True)
class SlotSize:
    """Which subgroups may be staged, and what their slots cost.

    Attributes:
        largest: Bytes of the largest subgroup that may be staged; 0 stages none.
        least: Bytes of a slot that any of them needs at least.
    """

    largest: float
    least: float


@dataclass(frozen=True)
class Shares:
    """The solution of one program.

    Attributes:
        seconds: Least time.
        largest: Bytes of the largest subgroup that may be staged.
        parameters: By footprint, parameters that are resident, staged and on the host.
    """

    seconds: float
    largest: float
    parameters: dict[Footprint, tuple[float, float, float]]


Members = dict[Footprint, NDArray[np.int64]]
"""Elements of all subgroups, by footprint."""


def members_of(subgroups: Sequence[Subgroup]) -> Members:
    """Return the elements of all subgroups, by footprint."""
    members: dict[Footprint, list[int]] = {}
    for subgroup in subgroups:
        members.setdefault(subgroup.footprint, []).append(subgroup.elements)
    return {f: np.array(sizes, dtype=np.int64) for f, sizes in members.items()}


def slot_sizes(members: Members) -> list[SlotSize]:
    """Return the slots worth trying; none at all first."""
    every = [sizes * float(f.copied_in) for f, sizes in members.items()]
    sizes: list[float] = np.unique(np.concatenate(every)).tolist()
    count = min(INTERVALS, len(sizes))
    ends = [len(sizes) * (n + 1) // count for n in range(count)]
    starts = [0, *ends[:-1]]
    pairs = zip(starts, ends, strict=True)
    return [SlotSize(0.0, 0.0)] + [SlotSize(sizes[end - 1], sizes[start]) for start, end in pairs]


def lower_bound(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    hidden_window: HiddenWindow = NOTHING_HIDDEN,
    staging_slots: int = 2,
) -> float:
    """Return the seconds below which no schedule can go: the optimum over shares of parameters.

    Raises:
        MemoryShortage: Not even shares fit.
    """
    rates, members = rates_of(profile), members_of(subgroups)
    times = [
        found.seconds
        for size in slot_sizes(members)
        if (found := relaxed(rates, members, memory, hidden_window, staging_slots, size))
    ]
    if not times:
        raise shortage(subgroups, [Home.HOST] * len(subgroups), memory, staging_slots, "optimal")
    return min(times)


def relaxed(
    rates: OffloadRates,
    members: Members,
    memory: MemoryBudget,
    window: HiddenWindow,
    slots: float,
    size: SlotSize,
    charged: float | None = None,
) -> Shares | None:
    """Solve for shares; None if nothing fits, or the solver gives up.

    Variables: the time T, the late part of the flush, the shares of each footprint by home, the
    time in each state. `charged` is what a slot costs, None the least.
    """
    program = Program(rates, members, slots, size.largest)
    room = slots * (size.least if charged is None else charged)
    rows = [*program.lanes(), *program.memory(memory, room)]
    if math.isfinite(window.flush):
        rows.append(program.flush(window.flush))
    left = np.array([row for row, _ in rows])
    right = np.array([limit for _, limit in rows])
    largest = np.abs(left[:, 2:]).max(axis=1)
    largest[largest == 0.0] = 1.0
    solution = linprog(
        program.objective(),
        A_ub=left / largest[:, None],
        b_ub=right / largest,
        A_eq=program.each(),
        b_eq=program.totals,
        bounds=program.bounds(),
        method="highs",
    )
    if solution.status != 0:
        return None
    values = [float(value) for value in solution.x]
    return Shares(values[0] * program.unit, size.largest, program.parameters(values))


class Program:
    """The matrices of one linear program. Parameters count as shares of all, time in units of
    what all on the host would take, so that the solver's absolute tolerances mean something.
    """

    def __init__(self, rates: OffloadRates, members: Members, slots: float, largest: float) -> None:
        self.footprints = list(members)
        counts = [int(sizes.sum()) for sizes in members.values()]
        self.scale = float(max(1, sum(counts)))
        self.totals = [count / self.scale for count in counts]
        self.stageable = [
            int(sizes[sizes * f.copied_in <= largest].sum()) / self.scale
            for f, sizes in members.items()
        ]
        self.slots = slots
        # Every parameter pays at least the overhead of a parameter in the largest piece.
        self.works = [
            work_of(rates, f, rates.piece_overhead_seconds / max(1, int(sizes.max())))
            for f, sizes in members.items()
        ]
        self.unit = max(work.cpu[-1] + work.weights[-1] for work in self.works) * self.scale
        self.speeds = state_speeds(rates, members)

    def column(self, kind: str) -> list[float]:
        """Return the time units of one kind of work, by footprint and home."""
        return [
            seconds * self.scale / self.unit
            for work in self.works
            for seconds in getattr(work, kind)
        ]

    def lanes(self) -> list[tuple[list[float], float]]:
        """Return the rows of time."""
        none, still = [0.0] * 3 * len(self.works), [0.0] * len(STATES)
        rows = [[-1.0, 1.0, *none, *([1.0] * len(STATES))]]
        for kind in KINDS:
            done = [-speeds.get(kind, 0.0) for speeds in self.speeds]
            rows.append([0.0, 0.0, *self.column(kind), *done])
        rows.append([-1.0, 1.0, *self.column("device"), *still])
        rows.append([-1.0, 1.0, *self.column("dram"), *still])
        held = [float((up == "copy_in") + down) for up, down, _ in STATES]
        updated = [
            value * (place % 3 == STAGED) for place, value in enumerate(self.column("device"))
        ]
        rows.append([-self.slots, self.slots, *updated, *held])
        return [(row, 0.0) for row in rows]

    def memory(self, memory: MemoryBudget, room: float) -> list[tuple[list[float], float]]:
        """Return the rows of device and host memory."""
        still = [0.0] * len(STATES)
        rows: list[tuple[list[float], float]] = []
        for size_of, limit in (
            (device_bytes, memory.device_bytes - room),
            (host_bytes, memory.host_bytes),
        ):
            sizes = [float(size_of(f, home)) for f in self.footprints for home in HOMES]
            rows.append(([0.0, 0.0, *sizes, *still], min(limit / self.scale, sum(sizes))))
        return rows

    def flush(self, window: float) -> tuple[list[float], float]:
        """Return the row of gradients that backward does not hide."""
        return [0.0, -1.0, *self.column("flush"), *([0.0] * len(STATES))], window / self.unit

    def each(self) -> list[list[float]]:
        """Return the rows that give every parameter a home."""
        rows = np.zeros((len(self.works), 2 + 3 * len(self.works) + len(STATES)))
        for number in range(len(self.works)):
            rows[number, 2 + 3 * number : 5 + 3 * number] = 1.0
        return rows.tolist()

    def bounds(self) -> list[tuple[float, float | None]]:
        """Return the range of every variable."""
        shares: list[tuple[float, float | None]] = []
        for total, stageable in zip(self.totals, self.stageable, strict=True):
            shares += [(0.0, total), (0.0, stageable), (0.0, total)]
        times: list[tuple[float, float | None]] = [(0.0, None)]
        return times * 2 + shares + times * len(STATES)

    def objective(self) -> list[float]:
        """Return what is made small: time; among equally fast splits most on the device."""
        taste = [0.0, 2e-7, 3e-7] * len(self.works)
        return [1.0, 0.0, *taste, *([0.0] * len(STATES))]

    def parameters(self, values: list[float]) -> dict[Footprint, tuple[float, float, float]]:
        """Return the parameters by footprint and home of a solution."""
        found: dict[Footprint, tuple[float, float, float]] = {}
        for number, footprint in enumerate(self.footprints):
            first, second, third = values[2 + 3 * number : 5 + 3 * number]
            found[footprint] = (first * self.scale, second * self.scale, third * self.scale)
        return found


def state_speeds(rates: OffloadRates, members: Members) -> list[dict[str, float]]:
    """Return how fast each kind of work goes in each state, as a share of its speed alone.

    Pieces that ask less of memory slow each other less; of every kind the least asking one counts.
    """
    demands = dict.fromkeys(KINDS, math.inf)
    memory = rates.host_dram_bytes_per_second / rates.ranks_per_node
    for footprint, sizes in members.items():
        smallest = max(1, int(sizes.min()))
        work = work_of(rates, footprint, rates.piece_overhead_seconds / smallest)
        for kind, demand in demands_of(work, footprint).items():
            demands[kind] = min(demands[kind], demand)
    speeds: list[dict[str, float]] = []
    for up, down, cpu in STATES:
        asked = [
            demands[up] if up else 0.0,
            demands["copy_out"] if down else 0.0,
            demands["cpu"] if cpu else 0.0,
            0.0,
        ]
        going = slowed([1.0] * 4, asked, rates.duplex_efficiency, memory)
        active = {up: going[0]} if up else {}
        active |= {"copy_out": going[1]} if down else {}
        active |= {"cpu": going[2]} if cpu else {}
        speeds.append(active)
    return speeds


def demands_of(work: Work, footprint: Footprint) -> dict[str, float]:
    """Return the host memory per second that each kind of piece uses alone."""
    bytes_of = {
        "copy_in": footprint.copied_in,
        "weights": footprint.weight,
        "copy_out": footprint.staged_copy,
        "cpu": footprint.host_update_dram,
    }
    return {kind: size / max(1e-30, *getattr(work, kind)) for kind, size in bytes_of.items()}
