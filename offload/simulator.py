"""A schedule played through event by event: which lane does what when, and when all is done.

Fluid model: each lane works on one piece at a time, at a rate that changes whenever another piece
begins or ends. While both copy directions are busy each runs at the duplex efficiency times its
rate. Host memory is shared by all ranks of the node, which are taken to do the same at the same
time; a memory controller serves small demands in full and divides the rest equally. No schedule
beats the lower bound of `performance_model`.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.schedule import Home, Schedule, Subgroup
from interlace.offload.timeline import Timeline, TimelineEvent


@dataclass(eq=False)
class Piece:
    """One copy or update.

    Attributes:
        lane: `h2d`, `d2h`, `cpu` or `device`.
        what: As in traces.
        subgroup: Number of the subgroup.
        bytes: What it moves or touches.
        seconds: How long it takes alone.
        dram: Bytes of host memory it reads and writes.
        urgent: Whether it goes before all pieces of its lane that are not.
        waits: Pieces that must end before.
        followers: Pieces that wait for this one.
        left: Share of it that is still to do.
        start: When it began.
        number: Its place in the order of submission.
    """

    lane: str
    what: str
    subgroup: int
    bytes: int
    seconds: float
    dram: float
    urgent: bool = False
    waits: int = 0
    followers: list["Piece"] = field(default_factory=list)
    left: float = 1.0
    start: float = 0.0
    number: int = 0

    def after(self, *earlier: "Piece") -> "Piece":
        """Wait for other pieces; return this one."""
        for piece in earlier:
            piece.followers.append(self)
            self.waits += 1
        return self


Queues = dict[str, list[tuple[bool, int, Piece]]]
"""Pieces that are ready, by lane: a heap each, in the order of `lanes.Lane`."""


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
    pieces = with_overhead(pieces_of(schedule, rates), rates)
    queues: Queues = {lane: [] for lane in ("h2d", "d2h", "cpu", "device")}
    for number, piece in enumerate(pieces):
        piece.number = number
        if not piece.waits:
            enqueue(piece, queues)
    active: dict[str, Piece] = {}
    events: list[TimelineEvent] = []
    now = 0.0
    while True:
        for lane, queue in queues.items():
            if lane not in active and queue:
                active[lane] = heapq.heappop(queue)[-1]
                active[lane].start = now
        if not active:
            break
        speeds = speeds_of(active, rates)
        step = min(piece.left / speeds[lane] for lane, piece in active.items())
        now += step
        for lane, piece in list(active.items()):
            piece.left -= step * speeds[lane]
            if piece.left <= 1e-12:
                del active[lane]
                finish(piece, now, events, queues)
    assert len(events) == len(pieces), "some piece waits for ever"
    return Timeline(tuple(events))


def finish(piece: Piece, now: float, events: list[TimelineEvent], queues: Queues) -> None:
    """Record a finished piece and release what waited for it."""
    events.append(
        TimelineEvent(piece.lane, piece.what, piece.subgroup, piece.start, now, piece.bytes)
    )
    for follower in piece.followers:
        follower.waits -= 1
        if not follower.waits:
            enqueue(follower, queues)


def enqueue(piece: Piece, queues: Queues) -> None:
    """Queue a piece that is ready; what holds a staging slot goes before what can wait."""
    heapq.heappush(queues[piece.lane], (not piece.urgent, piece.number, piece))


def speeds_of(active: dict[str, Piece], rates: OffloadRates) -> dict[str, float]:
    """Return the share of each active piece that is done per second now."""
    both = "h2d" in active and "d2h" in active
    speeds = {
        lane: (rates.duplex_efficiency if both and lane in ("h2d", "d2h") else 1.0)
        / max(piece.seconds, 1e-15)
        for lane, piece in active.items()
    }
    wanted = {lane: piece.dram * speeds[lane] for lane, piece in active.items() if piece.dram > 0}
    granted = fair_shares(wanted, rates.host_dram_bytes_per_second / rates.ranks_per_node)
    for lane, share in granted.items():
        speeds[lane] *= share / wanted[lane]
    return speeds


def fair_shares(wanted: dict[str, float], available: float) -> dict[str, float]:
    """Divide a rate so that small wishes are met in full and large ones get equal parts of the
    rest.
    """
    granted: dict[str, float] = {}
    waiting = sorted(wanted, key=lambda lane: wanted[lane])
    for done, lane in enumerate(waiting):
        granted[lane] = min(wanted[lane], available / (len(waiting) - done))
        available -= granted[lane]
    return granted


def pieces_of(schedule: Schedule, rates: OffloadRates) -> list[Piece]:
    """Return all pieces of an update in the order in which the executor submits them."""
    pieces: list[Piece] = []
    slots: deque[Piece | None] = deque([None] * schedule.staging_slots)
    for number, (subgroup, home) in enumerate(zip(schedule.subgroups, schedule.homes, strict=True)):
        match home:
            case Home.RESIDENT:
                pieces.append(device_update(number, subgroup, rates))
            case Home.HOST:
                pieces += host_pieces(number, subgroup, rates)
            case Home.STAGED:
                freed = slots.popleft()
                staged = staged_pieces(number, subgroup, rates, freed)
                slots.append(staged[-1])
                pieces += staged
    return pieces


def host_pieces(number: int, subgroup: Subgroup, rates: OffloadRates) -> list[Piece]:
    """Update on the CPU, weights up."""
    footprint, elements = subgroup.footprint, subgroup.elements
    size, weights = elements * footprint.host_update, elements * footprint.weight
    updated = Piece(
        "cpu", "update", number, size, size / rates.cpu_update_bytes_per_second, float(size)
    )
    sent = Piece(
        "h2d", "weights", number, weights, weights / rates.h2d_bytes_per_second, float(weights)
    )
    return [updated, sent.after(updated)]


def staged_pieces(
    number: int, subgroup: Subgroup, rates: OffloadRates, freed: Piece | None
) -> list[Piece]:
    """State in, update on the device, state out."""
    size = subgroup.elements * subgroup.footprint.staged_copy
    sent = Piece("h2d", "copy in", number, size, size / rates.h2d_bytes_per_second, float(size))
    if freed is not None:
        sent.after(freed)
    updated = device_update(number, subgroup, rates, urgent=True).after(sent)
    back = Piece("d2h", "copy out", number, size, size / rates.d2h_bytes_per_second, float(size))
    return [sent, updated, back.after(updated)]


def with_overhead(pieces: list[Piece], rates: OffloadRates) -> list[Piece]:
    """Add to every piece what it takes beside its bytes."""
    for piece in pieces:
        piece.seconds += rates.piece_overhead_seconds
    return pieces


def device_update(
    number: int, subgroup: Subgroup, rates: OffloadRates, urgent: bool = False
) -> Piece:
    """Update on the device."""
    size = subgroup.elements * subgroup.footprint.device_update
    seconds = size / rates.device_update_bytes_per_second
    return Piece("device", "update", number, size, seconds, 0.0, urgent)
