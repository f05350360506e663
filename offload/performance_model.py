"""Profile, subgroups and memory in; the split that takes least time out.

`solve` minimises the time of the slowest lane by a linear program over the shares of parameters
that are resident, staged and updated on the host, subject to device and host memory; the shares
then become whole subgroups by error diffusion, evenly spread over the update. The lanes are those
of a machine, not of a schedule: copies in each direction (slower while both run), the CPU, the
device, and host memory, which all ranks of a node share. `published_stride` is the rule of Deep
Optimizer States (arXiv 2410.21316), which knows neither host memory nor shares above one half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from interlace.offload.fit import (
    check_memory,
    device_bytes,
    fits,
    host_bytes,
    memory_needs,
    shortage,
)
from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.schedule import (
    NOTHING_HIDDEN,
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    MemoryShortage,
    Prediction,
    Schedule,
    Subgroup,
)
from interlace.offload.simulator import play

HOMES = (Home.RESIDENT, Home.STAGED, Home.HOST)
STRATEGIES = ("none", "host", "stride", "optimal")

MOST_MOVES = 8
"""Single subgroups that are moved after rounding; error diffusion is at most a few off."""

SIMULATED_UP_TO = 512
"""Schedules of so many subgroups are predicted event by event; longer ones by their lanes, which
differ from it by less than one subgroup in so many."""


@dataclass(frozen=True)
class Shares:
    """Parameters by home, of all subgroups with one footprint."""

    footprint: Footprint
    resident: float = 0.0
    staged: float = 0.0
    host: float = 0.0


def solve(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    hidden_window: HiddenWindow = NOTHING_HIDDEN,
    *,
    strategy: str = "optimal",
    stride: int | None = None,
    staging_slots: int = 2,
) -> Schedule:
    """Give every subgroup a home.

    Args:
        profile: The machine; its `rates` must be known.
        subgroups: What is updated, in the order of the update.
        memory: What one rank's state may occupy.
        hidden_window: Compute beside which the update may run.
        strategy: `none`, `host`, `stride` or `optimal`.
        stride: With `stride`: every so many subgroups one is staged; None takes the published rule.
        staging_slots: Sets of device buffers for staged subgroups.

    Raises:
        ValueError: An unknown strategy, a stride below 1, or a profile without rates.
        MemoryShortage: No assignment fits the memory.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if stride is not None and stride < 1:
        raise ValueError(f"stride={stride}: must be 1 or more")
    rates = rates_of(profile)
    count = len(subgroups)
    if strategy == "optimal":
        homes = optimal_homes(rates, subgroups, memory, hidden_window, staging_slots)
    else:
        if strategy == "stride" and stride is None:
            stride = published_stride(profile, subgroups[0].footprint)
        homes = fixed_homes(strategy, count, stride)
        assert homes is not None, "with a stride every other strategy is fixed"
    check_memory(subgroups, homes, memory, staging_slots, strategy)
    schedule = Schedule(
        strategy=strategy,
        subgroups=tuple(subgroups),
        homes=tuple(homes),
        staging_slots=staging_slots,
        prediction=predict(rates, subgroups, homes, hidden_window),
    )
    if count > SIMULATED_UP_TO:
        return schedule
    return with_simulated_time(schedule, rates, hidden_window)


def fixed_homes(strategy: str, count: int, stride: int | None) -> list[Home] | None:
    """Return the homes of a strategy that needs no knowledge of the machine, or None."""
    match strategy:
        case "none":
            return [Home.RESIDENT] * count
        case "host":
            return [Home.HOST] * count
        case "stride" if stride is not None:
            return [Home.STAGED if not (n + 1) % stride else Home.HOST for n in range(count)]
        case _:
            return None


def rates_of(profile: HardwareProfile) -> OffloadRates:
    """Return the rates of a profile; `ValueError` if it has none."""
    if profile.rates is None:
        raise ValueError(
            f"the profile {profile.name or profile.device_name} has no copy and update rates; "
            "measure them with `interlace profile`"
        )
    return profile.rates


def published_stride(profile: HardwareProfile, footprint: Footprint) -> int:
    """Return k of Deep Optimizer States: one subgroup in k is updated on the device.

    k = 1 + ceil((3/B + 1/U_g) / (1/U_c + 1/D_c)), at least 2, with B the elements per second of one
    copy direction in float32 and U, D the update and cast rates; reconstructed from the published
    system, see arXiv 2410.21316. Our CPU update casts in the same pass, so 1/D_c is part of 1/U_c.
    """
    rates = rates_of(profile)
    copy = footprint.staged_copy / min(rates.h2d_bytes_per_second, rates.d2h_bytes_per_second)
    device = footprint.device_update / rates.device_update_bytes_per_second
    host = footprint.host_update / rates.cpu_update_bytes_per_second
    return max(2, 1 + math.ceil((copy + device) / host))


# ---- the linear program -----------------------------------------------------------------------


def optimal_homes(
    rates: OffloadRates,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    window: HiddenWindow,
    slots: int,
) -> list[Home]:
    """Return the best homes; raise `MemoryShortage` if nothing fits."""
    classes: dict[Footprint, int] = {}
    for subgroup in subgroups:
        classes[subgroup.footprint] = classes.get(subgroup.footprint, 0) + subgroup.elements
    without = relaxed(rates, classes, memory, window, staging_bytes=None)
    room = slots * max(s.elements * s.footprint.staged_copy for s in subgroups)
    staging = relaxed(rates, classes, memory, window, staging_bytes=room)
    found = [solution for solution in (without, staging) if solution is not None]
    if not found:
        raise shortage(subgroups, [Home.HOST] * len(subgroups), memory, slots, "optimal")
    candidates = [
        assign(subgroups, shares, memory, room if any(s.staged for s in shares) else 0)
        for _, shares in found
    ]
    candidates = [improve(rates, subgroups, homes, memory, window, slots) for homes in candidates]
    # Relaxed times are lower bounds; whole subgroups decide, and the simple strategies compete.
    candidates += [[Home.HOST] * len(subgroups), [Home.RESIDENT] * len(subgroups)]
    fitting = [homes for homes in candidates if fits(memory_needs(subgroups, homes, slots), memory)]
    if not fitting:
        raise shortage(subgroups, candidates[0], memory, slots, "optimal")
    return min(fitting, key=lambda homes: expected_seconds(rates, subgroups, homes, window, slots))


def expected_seconds(
    rates: OffloadRates,
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    window: HiddenWindow,
    slots: int,
) -> float:
    """Return the update time of homes: event by event, or by lanes where there are many."""
    prediction = predict(rates, subgroups, homes, window)
    if len(subgroups) > SIMULATED_UP_TO:
        return prediction.update_seconds
    schedule = Schedule("optimal", tuple(subgroups), tuple(homes), slots, prediction)
    return with_simulated_time(schedule, rates, window).prediction.update_seconds


def lower_bound(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    hidden_window: HiddenWindow = NOTHING_HIDDEN,
    staging_slots: int = 2,
) -> float:
    """Return the seconds below which no schedule can go: the optimum over shares of parameters."""
    classes: dict[Footprint, int] = {}
    for subgroup in subgroups:
        classes[subgroup.footprint] = classes.get(subgroup.footprint, 0) + subgroup.elements
    room = staging_slots * max(s.elements * s.footprint.staged_copy for s in subgroups)
    times = [
        found[0]
        for staging in (None, room)
        if (found := relaxed(rates_of(profile), classes, memory, hidden_window, staging))
    ]
    if not times:
        raise shortage(subgroups, [Home.HOST] * len(subgroups), memory, staging_slots, "optimal")
    return min(times)


def relaxed(
    rates: OffloadRates,
    classes: dict[Footprint, int],
    memory: MemoryBudget,
    window: HiddenWindow,
    staging_bytes: int | None,
) -> tuple[float, list[Shares]] | None:
    """Solve for shares: least time and parameters by home, or None if nothing fits.

    Variables are the time T and, per footprint, the parameters with each home; `staging_bytes` is
    the device memory of the slots, None forbids staging.
    """
    footprints, totals = list(classes), list(classes.values())
    scale = float(sum(totals))
    rows = lane_rows(rates, footprints, window)
    bounds = [(0.0, None)] + [
        (0.0, 0.0 if staging_bytes is None and home is Home.STAGED else total / scale)
        for total in totals
        for home in HOMES
    ]
    limits = [
        (
            [0.0, *(device_bytes(f, home) for f in footprints for home in HOMES)],
            (memory.device_bytes - (staging_bytes or 0)) / scale,
        ),
        (
            [0.0, *(host_bytes(f, home) for f in footprints for home in HOMES)],
            memory.host_bytes / scale,
        ),
    ]
    left = [[-1.0, *row] for row, _ in rows.values()] + [row for row, _ in limits]
    right = [hidden / scale for _, hidden in rows.values()] + [limit for _, limit in limits]
    each = np.zeros((len(footprints), 1 + 3 * len(footprints)))
    for number in range(len(footprints)):
        each[number, 1 + 3 * number : 4 + 3 * number] = 1.0
    # Among equally fast splits the one with most on the device, then least on the host.
    unit = 1.0 / max(max(row) for row, _ in rows.values())
    taste = [1e-7 * {Home.RESIDENT: 0, Home.STAGED: 2, Home.HOST: 3}[home] for home in HOMES]
    solution = linprog(
        [unit, *(taste * len(footprints))],
        A_ub=scaled(left),
        b_ub=scaled_right(left, right),
        A_eq=each,
        b_eq=[total / scale for total in totals],
        bounds=bounds,
        method="highs",
    )
    if solution.status != 0:
        return None
    values = [float(value) * scale for value in solution.x]
    shares = [
        Shares(footprint, *values[1 + 3 * n : 4 + 3 * n]) for n, footprint in enumerate(footprints)
    ]
    return values[0], shares


def scaled(rows: list[list[float]]) -> list[list[float]]:
    """Return rows divided by their largest coefficient: the solver's tolerances are absolute."""
    return [[value / largest(row) for value in row] for row in rows]


def scaled_right(rows: list[list[float]], right: list[float]) -> list[float]:
    """Return right-hand sides scaled like their rows."""
    return [limit / largest(row) for row, limit in zip(rows, right, strict=True)]


def largest(row: list[float]) -> float:
    """Return the largest coefficient of a row beside the time's, or 1."""
    return max(abs(value) for value in row[1:]) or 1.0


def lane_rows(
    rates: OffloadRates, footprints: Sequence[Footprint], window: HiddenWindow
) -> dict[str, tuple[list[float], float]]:
    """Return for each lane the seconds per parameter by footprint and home, and the seconds it may
    work before the update begins.

    With duplex efficiency e both directions run at e times their rate while both are busy; then any
    schedule takes at least up + (1/e - 1) down, and the same with both exchanged.
    """
    loads = [(f, home) for f in footprints for home in HOMES]
    up = [h2d_bytes(f, home) / rates.h2d_bytes_per_second for f, home in loads]
    down = [d2h_bytes(f, home) / rates.d2h_bytes_per_second for f, home in loads]
    drag = 1.0 / rates.duplex_efficiency - 1.0
    per_node = rates.ranks_per_node / rates.host_dram_bytes_per_second
    rows = {
        "h2d": ([a + drag * b for a, b in zip(up, down, strict=True)], 0.0),
        "d2h": ([b + drag * a for a, b in zip(up, down, strict=True)], 0.0),
        "cpu": (
            [
                f.host_update / rates.cpu_update_bytes_per_second if home is Home.HOST else 0.0
                for f, home in loads
            ],
            0.0,
        ),
        "device": (
            [
                0.0 if home is Home.HOST else f.device_update / rates.device_update_bytes_per_second
                for f, home in loads
            ],
            0.0,
        ),
        "dram": ([dram_bytes(f, home) * per_node for f, home in loads], 0.0),
    }
    if math.isfinite(window.flush):
        flush = [
            f.gradient / rates.d2h_bytes_per_second if home is Home.HOST else 0.0
            for f, home in loads
        ]
        rows["flush"] = (flush, window.flush)
    return rows


def h2d_bytes(footprint: Footprint, home: Home) -> int:
    """Return what one parameter sends to the device in an update."""
    sent = {Home.STAGED: footprint.staged_copy, Home.HOST: footprint.weight}
    return sent.get(home, 0)


def d2h_bytes(footprint: Footprint, home: Home) -> int:
    """Return what one parameter sends to the host in an update; gradients went before."""
    return footprint.staged_copy if home is Home.STAGED else 0


def dram_bytes(footprint: Footprint, home: Home) -> int:
    """Return the host memory traffic of one parameter in an update; its gradient arrived before."""
    if home is Home.HOST:
        return footprint.host_dram - footprint.gradient
    return footprint.staged_dram if home is Home.STAGED else 0


# ---- whole subgroups --------------------------------------------------------------------------


def assign(
    subgroups: Sequence[Subgroup],
    shares: Sequence[Shares],
    memory: MemoryBudget,
    staging_bytes: int,
) -> list[Home]:
    """Turn shares into homes by error diffusion: each subgroup takes the home that is furthest
    behind its share. Room that is left on the device is filled afterwards.
    """
    totals = {s.footprint: s.resident + s.staged + s.host for s in shares}
    wanted = {s.footprint: (s.resident, s.staged, s.host) for s in shares}
    given = {s.footprint: [0.0, 0.0, 0.0] for s in shares}
    seen = dict.fromkeys(totals, 0.0)
    room = memory.device_bytes - staging_bytes
    homes: list[Home] = []
    for subgroup in subgroups:
        footprint, size = subgroup.footprint, subgroup.elements
        seen[footprint] += size
        progress = seen[footprint] / totals[footprint]
        behind = [
            want * progress - have
            for want, have in zip(wanted[footprint], given[footprint], strict=True)
        ]
        for index in sorted(range(3), key=lambda index: -behind[index]):
            cost = size * device_bytes(footprint, HOMES[index])
            if cost <= room and (index != 1 or wanted[footprint][1] > 0):
                break
        else:
            index, cost = 2, 0
        room -= cost
        given[footprint][index] += size
        homes.append(HOMES[index])
    return fill_device(subgroups, homes, room)


def improve(
    rates: OffloadRates,
    subgroups: Sequence[Subgroup],
    homes: list[Home],
    memory: MemoryBudget,
    window: HiddenWindow,
    slots: int,
) -> list[Home]:
    """Move single subgroups between host and staged while that shortens the slowest lane: whole
    subgroups seldom hit the shares exactly.
    """
    best = predict(rates, subgroups, homes, window).update_seconds
    for _ in range(MOST_MOVES):
        trials: list[tuple[float, list[Home]]] = []
        for leaving, entering in ((Home.HOST, Home.STAGED), (Home.STAGED, Home.HOST)):
            numbers = [n for n, home in enumerate(homes) if home is leaving]
            if not numbers or Home.STAGED not in homes:
                continue
            numbers.sort(key=lambda n: subgroups[n].elements)
            for number in {numbers[0], numbers[len(numbers) // 2], numbers[-1]}:
                trial = [*homes[:number], entering, *homes[number + 1 :]]
                if fits(memory_needs(subgroups, trial, slots), memory):
                    time = predict(rates, subgroups, trial, window).update_seconds
                    trials.append((time, trial))
        time, trial = min(trials, default=(math.inf, homes), key=lambda pair: pair[0])
        if time >= best * (1 - 1e-9):
            break
        best, homes = time, trial
    return homes


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


def predict(
    rates: OffloadRates,
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    window: HiddenWindow,
) -> Prediction:
    """Return the time of each lane for whole subgroups, and of the slowest."""
    elements: dict[tuple[Footprint, Home], int] = {}
    for subgroup, home in zip(subgroups, homes, strict=True):
        key = (subgroup.footprint, home)
        elements[key] = elements.get(key, 0) + subgroup.elements
    footprints = list(dict.fromkeys(footprint for footprint, _ in elements))
    counts = [elements.get((f, home), 0) for f in footprints for home in HOMES]
    lanes = {
        name: max(0.0, sum(a * n for a, n in zip(row, counts, strict=True)) - hidden)
        for name, (row, hidden) in lane_rows(rates, footprints, window).items()
    }
    bound = max(lanes, key=lambda name: lanes[name])
    return Prediction(lanes[bound], max(0.0, lanes[bound] - window.total), lanes, bound)


def with_simulated_time(schedule: Schedule, rates: OffloadRates, window: HiddenWindow) -> Schedule:
    """Return a schedule whose times include what only the order of events shows."""
    late = schedule.prediction.lane_seconds.get("flush", 0.0)
    seconds = max(schedule.prediction.update_seconds, late + play(schedule, rates).makespan)
    exposed = max(0.0, seconds - window.total)
    timed = replace(schedule.prediction, update_seconds=seconds, exposed_seconds=exposed)
    return replace(schedule, prediction=timed)


def predict_homes(profile: HardwareProfile, schedule: Schedule, window: HiddenWindow) -> Schedule:
    """Return a schedule with the times that its homes would take on another machine."""
    rates = rates_of(profile)
    again = replace(schedule, prediction=predict(rates, schedule.subgroups, schedule.homes, window))
    few = len(schedule.subgroups) <= SIMULATED_UP_TO
    return with_simulated_time(again, rates, window) if few else again


def compare(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    hidden_window: HiddenWindow = NOTHING_HIDDEN,
    *,
    stride: int | None = None,
    staging_slots: int = 2,
) -> dict[str, Schedule | MemoryShortage]:
    """Return every strategy's schedule, or why it does not fit."""
    outcome: dict[str, Schedule | MemoryShortage] = {}
    for strategy in STRATEGIES:
        try:
            outcome[strategy] = solve(
                profile,
                subgroups,
                memory,
                hidden_window,
                strategy=strategy,
                stride=stride,
                staging_slots=staging_slots,
            )
        except MemoryShortage as error:
            outcome[strategy] = error
    return outcome
