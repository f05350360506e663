"""From shares of parameters to a home for every whole subgroup.

Error diffusion spreads each footprint's shares evenly over the update. Then single subgroups and
pairs of them move while that brings memory into its bounds or shortens the longest lane: counts
that are whole seldom hit the shares exactly. Few subgroups are not searched but enumerated. What
is decided here by lanes is decided finally by the simulator, in `performance_model`.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from interlace.offload.fit import device_bytes
from interlace.offload.loads import HOMES, HOST, RESIDENT, STAGED, Codes, Floats, Loads
from interlace.offload.schedule import Home, MemoryBudget, Subgroup

ENUMERATED = 7
"""So many subgroups have few enough assignments (3 to the power of it) to look at all."""

MOST_MOVES = 40
"""Moves after rounding; error diffusion is at most a few subgroups off."""

REPRESENTATIVES = 5
"""Subgroups of different size that stand for all with one footprint and home, when one moves."""

OVERFULL = 1e6
"""What a budget that is exceeded by its own size counts, in times of the update."""


class Rounding:
    """Whole homes for one set of subgroups, one size of slots.

    Args:
        loads: What they ask for.
        memory: What they may occupy.
        largest: Bytes of the largest subgroup that may be staged; 0 stages none.
    """

    def __init__(self, loads: Loads, memory: MemoryBudget, largest: float) -> None:
        self.loads = loads
        self.largest = largest
        room = memory.device_bytes - loads.slots * largest
        self.budget = np.array([room, memory.host_bytes], dtype=np.float64)
        self.stageable = loads.slot <= largest
        self.by_size = np.lexsort((loads.elements, loads.kinds))
        self.all_memory: Floats = loads.memory.max(axis=1).sum(axis=0) + 1.0
        # Seconds in which a score of memory counts.
        self.unit = float(loads.seconds.max(axis=2).sum())

    def diffused(self, shares: dict[int, tuple[float, float, float]]) -> Codes:
        """Give each subgroup the home that is furthest behind its share.

        Args:
            shares: Parameters by home, by number of the footprint.
        """
        homes = np.full(len(self.loads.kinds), HOST, dtype=np.int64)
        given = {kind: [0.0, 0.0, 0.0] for kind in shares}
        seen = dict.fromkeys(shares, 0.0)
        kinds, sizes = self.loads.kinds.tolist(), self.loads.elements.tolist()
        stageable = self.stageable.tolist()
        for number, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
            wanted, given_here = shares[kind], given[kind]
            seen[kind] += size
            progress = seen[kind] / max(1.0, sum(wanted))
            behind = [want * progress - have for want, have in zip(wanted, given_here, strict=True)]
            if not stageable[number]:
                behind[STAGED] = -np.inf
            # Nothing goes beyond half a subgroup more than its share.
            spent = [have + size / 2 > want for want, have in zip(wanted, given_here, strict=True)]
            chosen = max(range(3), key=lambda home: (not spent[home], behind[home]))
            given_here[chosen] += size
            homes[number] = chosen
        return homes

    def respread(self, homes: Codes) -> Codes:
        """Spread the same numbers of homes evenly again, among subgroups of one kind and size."""
        loads = self.loads
        types: dict[tuple[int, float], list[int]] = {}
        kinds_and_sizes = zip(loads.kinds.tolist(), loads.elements.tolist(), strict=True)
        for number, key in enumerate(kinds_and_sizes):
            types.setdefault(key, []).append(number)
        spread = homes.copy()
        for numbers in types.values():
            counts = np.bincount(homes[numbers], minlength=3).tolist()
            spread[numbers] = evenly(counts)
        return spread

    def excess(self, memory: Floats) -> Floats:
        """Return by how much memory exceeds the budget, as a share of what all subgroups need."""
        beyond = np.maximum(0.0, memory - self.budget)
        return (beyond / self.all_memory).sum(axis=-1)

    def score(self, lanes: Floats, flush: Floats, memory: Floats) -> Floats:
        """Return what a move should lower: excess of memory, then the longest lane, then all."""
        longest = lanes.max(axis=-1) + self.loads.late(flush)
        return longest + 1e-7 * lanes.sum(axis=-1) + OVERFULL * self.unit * self.excess(memory)

    def descend(self, homes: Codes) -> Codes:
        """Move single subgroups and pairs while the score falls."""
        homes = homes.copy()
        lanes, flush, memory = self.loads.totals(homes)
        best = float(self.score(lanes, np.array(flush), memory))
        for _ in range(MOST_MOVES):
            numbers, targets = self.moves(homes)
            if not len(numbers):
                break
            here = homes[numbers]
            lane_change = self.loads.seconds[numbers, targets] - self.loads.seconds[numbers, here]
            flush_change = self.loads.flush[numbers, targets] - self.loads.flush[numbers, here]
            memory_change = self.loads.memory[numbers, targets] - self.loads.memory[numbers, here]
            scores = self.score(
                lanes + lane_change[:, None] + lane_change[None],
                flush + flush_change[:, None] + flush_change[None],
                memory + memory_change[:, None] + memory_change[None],
            )
            scores[numbers[:, None] == numbers[None]] = np.inf
            alone = self.score(lanes + lane_change, flush + flush_change, memory + memory_change)
            np.fill_diagonal(scores, alone)
            first, second = np.unravel_index(int(scores.argmin()), scores.shape)
            if scores[first, second] >= best - 1e-9 * abs(best):
                break
            best = float(scores[first, second])
            for move in {int(first), int(second)}:
                homes[numbers[move]] = targets[move]
                lanes, memory = lanes + lane_change[move], memory + memory_change[move]
                flush += float(flush_change[move])
        return homes

    def moves(self, homes: Codes) -> tuple[Codes, Codes]:
        """Return subgroups that may move and where to: of every footprint and home a few sizes."""
        numbers: list[int] = []
        targets: list[int] = []
        ordered = self.by_size
        keys = self.loads.kinds[ordered] * 3 + homes[ordered]
        for key in np.unique(keys):
            members = ordered[keys == key]
            places = np.linspace(0, len(members) - 1, min(REPRESENTATIVES, len(members)))
            for number in np.unique(members[places.astype(np.int64)]).tolist():
                for target in (RESIDENT, STAGED, HOST):
                    if target == key % 3 or (target == STAGED and not self.stageable[number]):
                        continue
                    numbers.append(number)
                    targets.append(target)
        return np.array(numbers, dtype=np.int64), np.array(targets, dtype=np.int64)

    def filled(self, homes: Codes) -> Codes:
        """Make subgroups resident while there is room and no lane becomes the longest by it."""
        homes = homes.copy()
        loads = self.loads
        lanes, _, memory = loads.totals(homes)
        longest, room = lanes.max() * (1 + 1e-12), self.budget[0] - memory[0]
        rows = np.arange(len(homes))
        needs = loads.memory[rows, RESIDENT, 0] - loads.memory[rows, homes, 0]
        for leaving in (HOST, STAGED):
            for number in np.flatnonzero((homes == leaving) & (needs <= room)).tolist():
                if needs[number] > room:
                    continue
                changed = lanes + loads.seconds[number, RESIDENT] - loads.seconds[number, leaving]
                if changed.max() <= longest:
                    lanes, homes[number] = changed, RESIDENT
                    room -= needs[number]
        return homes


def evenly(counts: Sequence[int]) -> list[int]:
    """Return so many of each home, each spread evenly."""
    total = sum(counts)
    given = [0, 0, 0]
    homes: list[int] = []
    for place in range(1, total + 1):
        chosen = max(
            (home for home in range(3) if given[home] < counts[home]),
            key=lambda home: counts[home] * place / total - given[home],
        )
        given[chosen] += 1
        homes.append(chosen)
    return homes


def every_assignment(loads: Loads, memory: MemoryBudget) -> list[tuple[float, Codes]]:
    """Return all homes of a few subgroups that fit, with their least seconds, shortest first."""
    count = len(loads.elements)
    homes = np.array(list(itertools.product(range(3), repeat=count)), dtype=np.int64)
    rows = np.arange(count)
    slots = loads.slots * np.where(homes == STAGED, loads.slot, 0.0).max(axis=1)
    needs = loads.memory[rows, homes].sum(axis=1)
    needs[:, 0] += slots
    fitting = (needs[:, 0] <= memory.device_bytes) & (needs[:, 1] <= memory.host_bytes)
    homes = homes[fitting]
    late = loads.late(loads.flush[rows, homes].sum(axis=1))
    seconds = loads.seconds[rows, homes].sum(axis=1).max(axis=1) + late
    return [(float(seconds[n]), homes[n]) for n in np.argsort(seconds, kind="stable").tolist()]


def fill_device(subgroups: Sequence[Subgroup], homes: list[Home], room: int) -> list[Home]:
    """Make subgroups resident while there is room, those on the host first."""
    for leaving in (Home.HOST, Home.STAGED):
        for number, subgroup in enumerate(subgroups):
            footprint, size = subgroup.footprint, subgroup.elements
            more = footprint.resident_memory - device_bytes(footprint, leaving)
            if homes[number] is leaving and size * more <= room:
                homes[number] = Home.RESIDENT
                room -= size * more
    return homes


def named(codes: Codes) -> list[Home]:
    """Return homes of codes."""
    return [HOMES[code] for code in codes.tolist()]
