"""A schedule played through event by event: which lane does what when, and when all is done.

Fluid model: each lane works on one piece at a time, at a rate that changes whenever another piece
begins or ends. While both copy directions are busy each runs at the duplex efficiency times its
rate. Host memory is shared by all ranks of the node, which are taken to do the same at the same
time; a memory controller serves small demands in full and divides the rest equally. No schedule
beats the lower bound of `bound.py`.

A staged subgroup takes the slot that frees first. That is the one whose turn it is, as in the
executor: staged subgroups pass every lane in the same order.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.schedule import Footprint, Home, Schedule, Subgroup
from interlace.offload.timeline import Timeline, TimelineEvent

H2D, D2H, CPU, DEVICE = range(4)
LANES = ("h2d", "d2h", "cpu", "device")
LANE_NUMBERS = (H2D, D2H, CPU, DEVICE)
IDLE = -1
INFINITE = float("inf")


def simulate(schedule: Schedule, profile: HardwareProfile) -> Timeline:
    """Play one update.

    Raises:
        ValueError: The profile has no rates.
    """
    if profile.rates is None:
        raise ValueError(f"the profile {profile.name or profile.device_name} has no rates")
    return play(schedule, profile.rates)


def play(schedule: Schedule, rates: OffloadRates) -> Timeline:
    """Play one update on a machine with these rates."""
    player = Player(schedule.subgroups, rates)
    return player.timeline(schedule.homes, schedule.staging_slots)


def slowed(
    rate: Sequence[float], demand: Sequence[float], duplex: float, memory_rate: float
) -> Sequence[float]:
    """Return the rates of the lanes, in the order of `LANES`, while they slow each other down.

    Args:
        rate: Of each alone.
        demand: Host memory per second that each alone would use; 0 where it is idle.
        duplex: Rate of each copy direction while both are busy, as a share.
        memory_rate: Host memory per second that there is.
    """
    up, down, cpu, _ = demand
    slow = duplex if up and down else 1.0
    up, down = up * slow, down * slow
    if up + down + cpu <= memory_rate:
        return rate if slow == 1.0 else (rate[0] * slow, rate[1] * slow, rate[2], rate[3])
    level = water_level((up, down, cpu), memory_rate)
    return (
        rate[0] * (slow * level / up if up > level else slow),
        rate[1] * (slow * level / down if down > level else slow),
        rate[2] * (level / cpu if cpu > level else 1.0),
        rate[3],
    )


def water_level(wanted: Sequence[float], available: float) -> float:
    """Return the most that a wish is granted: small ones are met in full, large ones get equal
    parts of the rest.
    """
    waiting = len(wanted)
    level = INFINITE
    for wish in sorted(wanted):
        level = available / waiting
        if wish >= level:
            break
        available -= wish
        waiting -= 1
    return level


Piece = tuple[float, float, int]
"""One copy or update: seconds and bytes of host memory per second that it takes alone, and bytes as
in traces."""

Done = tuple[int, int, float, float]
"""A piece that has ended: lane, number of the subgroup, start, stop."""


@dataclass(frozen=True, slots=True)
class Times:
    """What the order of events comes to.

    Attributes:
        makespan: Seconds from the first to the last event.
        ready: When each subgroup's weights are new.
        alone: Seconds until they are, were there no other subgroup.
    """

    makespan: float
    ready: list[float]
    alone: list[float]


def pieces_of(
    subgroups: Sequence[Subgroup], rates: OffloadRates
) -> dict[Home, tuple[list[Piece], ...]]:
    """Return what every subgroup asks of each lane, in the order of `LANES`, by home."""
    elements = np.array([subgroup.elements for subgroup in subgroups], dtype=np.int64)

    def pieces(size_of: Callable[[Footprint], tuple[int, int]], rate: float) -> list[Piece]:
        sizes = {footprint: size_of(footprint) for footprint in footprints}
        each = np.array([sizes[subgroup.footprint] for subgroup in subgroups])
        moved, memory = elements * each[:, 0], elements * each[:, 1]
        seconds = np.maximum(moved / rate + rates.piece_overhead_seconds, 1e-15)
        demand = memory / seconds
        return list(zip(seconds.tolist(), demand.tolist(), moved.tolist(), strict=True))

    footprints = {subgroup.footprint for subgroup in subgroups}
    up, down = rates.h2d_bytes_per_second, rates.d2h_bytes_per_second
    on_device = pieces(lambda f: (f.device_update, 0), rates.device_update_bytes_per_second)
    on_cpu = pieces(
        lambda f: (f.host_update, f.host_update_dram), rates.cpu_update_bytes_per_second
    )
    copy_in = pieces(lambda f: (f.copied_in, f.copied_in), up)
    copy_out = pieces(lambda f: (f.staged_copy, f.staged_copy), down)
    weights = pieces(lambda f: (f.weight, f.weight), up)
    nothing: list[Piece] = []
    return {
        Home.RESIDENT: (nothing, nothing, nothing, on_device),
        Home.STAGED: (copy_in, copy_out, nothing, on_device),
        Home.HOST: (weights, nothing, on_cpu, nothing),
    }


def seconds_alone(home: Home, pieces: Sequence[Sequence[Piece]]) -> list[float]:
    """Return how long every subgroup of a home takes to have new weights, one piece after another,
    with all lanes to itself.
    """
    needed = [lane for lane in LANE_NUMBERS if pieces[lane] and lane != D2H]
    assert needed, f"{home} updates on some lane"
    each = zip(*(pieces[lane] for lane in needed), strict=True)
    return [sum(piece[0] for piece in of_one) for of_one in each]


class Player:
    """Plays updates of the same subgroups with any homes.

    Args:
        subgroups: In the order of the update.
        rates: Of the machine.
    """

    def __init__(self, subgroups: Sequence[Subgroup], rates: OffloadRates) -> None:
        self.pieces = pieces_of(subgroups, rates)
        self.alone = {home: seconds_alone(home, self.pieces[home]) for home in Home}
        self.blocking = [subgroup.footprint.upload_blocks for subgroup in subgroups]
        self.memory_rate = rates.host_dram_bytes_per_second / rates.ranks_per_node
        self.duplex = rates.duplex_efficiency

    def timeline(self, homes: Sequence[Home], slots: int) -> Timeline:
        """Return every event of an update."""
        events: list[TimelineEvent] = []
        for lane, number, start, stop in self.run(homes, slots):
            home = homes[number]
            what = {H2D: "copy in" if home is Home.STAGED else "weights", D2H: "copy out"}
            size = self.pieces[home][lane][number][-1]
            events.append(
                TimelineEvent(LANES[lane], what.get(lane, "update"), number, start, stop, size)
            )
        return Timeline(tuple(events))

    def times(self, homes: Sequence[Home], slots: int) -> Times:
        """Return when weights are new, and when all is done."""
        ready = [0.0] * len(homes)
        makespan = 0.0
        for lane, number, _, stop in self.run(homes, slots):
            makespan = stop
            if lane == DEVICE or (lane == H2D and homes[number] is Home.HOST):
                ready[number] = stop
        alone = [self.alone[home][number] for number, home in enumerate(homes)]
        return Times(makespan, ready, alone)

    def run(self, homes: Sequence[Home], slots: int) -> list[Done]:
        """Do all pieces; return them in the order in which they end."""
        queues = Queues(homes, slots, self.blocking)
        ready, pieces = queues.ready, self.pieces
        at, start = [IDLE] * 4, [0.0] * 4
        left, rate, demand = [0.0] * 4, [0.0] * 4, [0.0] * 4
        done: list[Done] = []
        now = 0.0
        while True:
            busy: list[int] = []
            for lane in LANE_NUMBERS:
                if at[lane] == IDLE:
                    if not ready[lane]:
                        demand[lane] = 0.0
                        continue
                    number = at[lane] = queues.take(lane)
                    seconds, demand[lane], _ = pieces[homes[number]][lane][number]
                    start[lane], left[lane], rate[lane] = now, 1.0, 1.0 / seconds
                busy.append(lane)
            if not busy:
                return done
            speeds = slowed(rate, demand, self.duplex, self.memory_rate)
            step = min([left[lane] / speeds[lane] for lane in busy])
            now += step
            for lane in busy:
                left[lane] -= step * speeds[lane]
                if left[lane] <= 1e-12:
                    done.append((lane, at[lane], start[lane], now))
                    queues.release(lane, at[lane])
                    at[lane] = IDLE


class Queues:
    """Subgroups whose next piece is ready, by lane, in the order of `lanes.Lane`: what holds a
    staging slot goes before what can wait, then what was submitted first.
    """

    def __init__(self, homes: Sequence[Home], slots: int, blocking: Sequence[bool]) -> None:
        self.homes, self.blocking, self.count = homes, blocking, len(homes)
        numbers = range(self.count)
        staged = [n for n in numbers if homes[n] is Home.STAGED]
        self.without_slot = staged[slots:][::-1]
        self.hosts = [n for n in reversed(numbers) if homes[n] is Home.HOST]
        # Urgent ones are numbered below zero.
        residents = [n for n in numbers if homes[n] is Home.RESIDENT]
        self.ready: list[list[int]] = [staged[:slots], [], [], residents]
        self.next_host()

    def next_host(self) -> None:
        """Let the CPU go on."""
        if self.hosts:
            self.ready[CPU].append(self.hosts.pop())

    def take(self, lane: int) -> int:
        """Return the subgroup that a lane works on next."""
        number = heapq.heappop(self.ready[lane])
        return number if number >= 0 else number + self.count

    def release(self, lane: int, number: int) -> None:
        """Let go what waited for a piece."""
        ready = self.ready
        if lane == CPU:
            heapq.heappush(ready[H2D], number)
            if not self.blocking[number]:
                self.next_host()
        elif lane == D2H:
            if self.without_slot:
                heapq.heappush(ready[H2D], self.without_slot.pop())
        elif lane == DEVICE:
            if self.homes[number] is Home.STAGED:
                heapq.heappush(ready[D2H], number)
        elif self.homes[number] is Home.STAGED:
            heapq.heappush(ready[DEVICE], number - self.count)
        elif self.blocking[number]:
            self.next_host()
