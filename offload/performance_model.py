"""Profile, subgroups and memory in; the split that takes least time out.

`solve` asks a linear program (`bound.py`) for the shares of parameters that are resident, staged
and updated on the host, makes whole subgroups of them (`whole_subgroups.py`), lets the simple
strategies compete, and plays the best event by event (`simulator.py`); what is played shortest
wins. The lanes are those of a machine, not of a schedule: copies in each direction (slower while
both run), the CPU, the device, and host memory, which all ranks of a node share.
`published_stride` is the rule of Deep Optimizer States (arXiv 2410.21316), which knows neither host
memory nor shares above one half.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from interlace.offload.bound import (
    Members,
    Shares,
    SlotSize,
    lower_bound,
    members_of,
    relaxed,
    slot_sizes,
)
from interlace.offload.fit import check_memory, shortage
from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.loads import HOMES, HOST, LOADED, Codes, Loads, rates_of
from interlace.offload.schedule import (
    NOTHING_HIDDEN,
    STRATEGIES,
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    MemoryShortage,
    Prediction,
    Schedule,
    Subgroup,
)
from interlace.offload.simulator import Player, Times
from interlace.offload.whole_subgroups import (
    ENUMERATED,
    Rounding,
    every_assignment,
    fill_device,
    named,
)

__all__ = [
    "STRATEGIES",
    "fill_device",
    "fixed_homes",
    "lower_bound",
    "predict_homes",
    "published_stride",
    "rates_of",
    "solve",
]

PLAYED_SUBGROUPS = 20_000
"""Subgroups that are played, in all candidates together, before the best so far is taken; one
candidate always is. Bounds the time of `solve`."""

MOST_ROUNDED = 8
"""Solutions of the linear program that become whole subgroups."""

MOST_TRIED = 1000
"""Moves that are looked at, played or not, to polish the best homes."""

MOST_SIZES = 3
"""Sizes of slots that are tried with slots that are not always filled."""

FILLED_SLOTS = (0.9, 0.7, 0.5)
"""Parts of the time for which slots may be taken to be filled."""

WORTH_OF_HIDDEN = 1e-3
"""What a second of update that compute hides counts beside one that it does not."""


def solve(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    hidden_window: HiddenWindow = NOTHING_HIDDEN,
    *,
    strategy: str = "optimal",
    stride: int | None = None,
    staging_slots: int | None = 2,
) -> Schedule:
    """Give every subgroup a home.

    Args:
        profile: The machine; its `rates` must be known.
        subgroups: What is updated, in the order of the update.
        memory: What one rank's state may occupy.
        hidden_window: Compute beside which the update may run.
        strategy: `none`, `host`, `stride` or `optimal`.
        stride: With `stride`: every so many subgroups one is staged; None takes the published rule.
        staging_slots: Sets of device buffers for staged subgroups; None takes the best of 2 to 4.

    Raises:
        ValueError: No subgroups, an unknown strategy, a stride below 1, or a profile without rates.
        MemoryShortage: No assignment fits the memory.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if stride is not None and stride < 1:
        raise ValueError(f"stride={stride}: must be 1 or more")
    if not subgroups:
        raise ValueError("subgroups=[]: there is nothing to give a home; pass at least one")
    if staging_slots is None:
        return best_slots(profile, subgroups, memory, hidden_window, strategy, stride)
    rates = rates_of(profile)
    if strategy == "optimal":
        search = Search(rates, subgroups, memory, hidden_window, staging_slots)
        homes = search.best(stride)
        return described(search.loads, search.times, strategy, homes, hidden_window)
    if strategy == "stride" and stride is None:
        stride = published_stride(profile, subgroups[0].footprint)
    homes = fixed_homes(strategy, len(subgroups), stride)
    assert homes is not None, "with a stride every other strategy is fixed"
    check_memory(subgroups, homes, memory, staging_slots, strategy)
    return predicted(rates, strategy, subgroups, homes, staging_slots, hidden_window)


def best_slots(
    profile: HardwareProfile,
    subgroups: Sequence[Subgroup],
    memory: MemoryBudget,
    window: HiddenWindow,
    strategy: str,
    stride: int | None,
) -> Schedule:
    """Return the best schedule with two to four staging slots."""
    found: list[Schedule] = []
    problem: MemoryShortage | None = None
    for slots in (2, 3, 4):
        try:
            found.append(
                solve(
                    profile,
                    subgroups,
                    memory,
                    window,
                    strategy=strategy,
                    stride=stride,
                    staging_slots=slots,
                )
            )
        except MemoryShortage as error:
            problem = problem or error
    if not found:
        assert problem is not None, "there is a schedule or a reason why not"
        raise problem
    # More slots take memory: only for a gain that a measurement would show.
    return min(found, key=lambda s: cost_of(s.prediction) * (1 + 1e-3 * s.staging_slots))


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


def published_stride(profile: HardwareProfile, footprint: Footprint) -> int:
    """Return k of Deep Optimizer States: one subgroup in k is updated on the device.

    k = 1 + ceil((3/B + 1/U_g) / (1/U_c + 1/D_c)), at least 2, with B the elements per second of one
    copy direction in float32 and U, D the update and cast rates; reconstructed from the published
    system, see arXiv 2410.21316. Our CPU update casts in the same pass, so 1/D_c is part of 1/U_c.
    """
    return stride_of(rates_of(profile), footprint)


def stride_of(rates: OffloadRates, footprint: Footprint) -> int:
    """Return the published stride on a machine with these rates."""
    copy = footprint.copied_in / min(rates.h2d_bytes_per_second, rates.d2h_bytes_per_second)
    device = footprint.device_update / rates.device_update_bytes_per_second
    host = footprint.host_update / rates.cpu_update_bytes_per_second
    return max(2, 1 + math.ceil((copy + device) / host))


# ---- the best homes ---------------------------------------------------------------------------


@dataclass
class Search:
    """Looks for the homes that are played shortest."""

    rates: OffloadRates
    subgroups: Sequence[Subgroup]
    memory: MemoryBudget
    window: HiddenWindow
    slots: int

    def __post_init__(self) -> None:
        self.loads = Loads(self.rates, self.subgroups, self.window, self.slots)
        self.player = Player(self.subgroups, self.rates)
        self.few = len(self.subgroups) <= PLAYED_SUBGROUPS // 10
        self.played = 0
        self.times = Times(math.inf, [], [])

    def best(self, stride: int | None) -> list[Home]:
        """Return the best homes.

        Raises:
            MemoryShortage: Nothing fits.
        """
        simple = [homes for homes in self.simple(stride) if self.fits(homes)]
        if simple and not simple[0].any() and not self.shortest(self.ranked(simple))[1].any():
            # All fits on the device, and no simple strategy is faster. The CPU could take a few
            # percent off it, at the price of host memory that others use.
            return named(simple[0])
        self.played = 0
        if len(self.subgroups) <= ENUMERATED:
            ranked = every_assignment(self.loads, self.memory)
            if not ranked:
                raise self.too_little(self.rounded())
            return named(self.shortest(ranked, patient=True)[1])
        candidates = self.rounded()
        fitting = [*(homes for homes in candidates if self.fits(homes)), *simple]
        if not fitting:
            raise self.too_little(candidates)
        cost, homes = self.shortest(self.ranked(unique(fitting)))
        return named(self.polished(cost, homes) if self.few else homes)

    def ranked(self, candidates: Sequence[Codes]) -> list[tuple[float, Codes]]:
        """Return homes with their least seconds."""
        return [(self.loads.least_seconds(homes), homes) for homes in candidates]

    def fits(self, homes: Codes) -> bool:
        """Whether homes stay within the budget."""
        return self.excess(homes) == (0.0, 0.0)

    def excess(self, homes: Codes) -> tuple[float, float]:
        """Return the bytes beyond the budgets of device and host."""
        device, host = self.loads.needs(homes)
        budget = self.memory
        return max(0.0, device - budget.device_bytes), max(0.0, host - budget.host_bytes)

    def too_little(self, candidates: list[Codes]) -> MemoryShortage:
        """Return what the homes that come nearest to fitting lack."""
        nearest = named(min(candidates, key=self.excess))
        return shortage(self.subgroups, nearest, self.memory, self.slots, "optimal")

    def rounded(self) -> list[Codes]:
        """Return whole homes near every solution of the linear program."""
        found: list[Codes] = []
        for shares in self.relaxed():
            rounding = Rounding(self.loads, self.memory, shares.largest)
            kinds = enumerate(dict.fromkeys(subgroup.footprint for subgroup in self.subgroups))
            wanted = {number: shares.parameters[footprint] for number, footprint in kinds}
            homes = rounding.descend(rounding.diffused(wanted))
            found.append(rounding.filled(homes))
            if self.few:
                spread = rounding.respread(homes)
                found += [spread, rounding.filled(spread)]
        # Whole subgroups may fit where the program found nothing; they are moved until they do.
        on_host = np.full(len(self.subgroups), HOST, dtype=np.int64)
        return [*found, Rounding(self.loads, self.memory, 0.0).descend(on_host), on_host]

    def relaxed(self) -> list[Shares]:
        """Return the solutions worth rounding, most promising first.

        The program fills the slots without a pause. Subgroups of different sizes cannot: a large
        one is copied in while a small one has long been copied out. So the best sizes of slots are
        tried again as if there were fewer slots, and playing decides.
        """
        members = members_of(self.subgroups)
        sizes = slot_sizes(members)
        full = [(shares, size) for size in sizes if (shares := self.shares(members, size, 1.0))]
        full.sort(key=lambda pair: pair[0].seconds)
        tried = [[shares for shares, _ in full]]
        for filled in FILLED_SLOTS:
            best = [size for shares, size in full if shares.largest][:MOST_SIZES]
            again = [shares for size in best if (shares := self.shares(members, size, filled))]
            tried.append(sorted(again, key=lambda shares: shares.seconds))
        if len(sizes) > 2:
            tried.reverse()
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*tried))
        return [shares for shares in in_turn if shares][: MOST_ROUNDED if self.few else 2]

    def shares(self, members: Members, size: SlotSize, filled: float) -> Shares | None:
        """Solve the linear program for slots that are filled for a part of the time."""
        slots = filled * self.slots
        charged = size.largest / filled
        return relaxed(self.rates, members, self.memory, self.window, slots, size, charged)

    def simple(self, stride: int | None) -> Iterator[Codes]:
        """Yield what needs no thought."""
        count = len(self.subgroups)
        for code in range(3):
            yield np.full(count, code, dtype=np.int64)
        stride = stride or stride_of(self.rates, self.subgroups[0].footprint)
        strided = fixed_homes("stride", count, stride)
        assert strided is not None
        yield np.array([HOMES.index(home) for home in strided], dtype=np.int64)

    def play(self, homes: Codes) -> tuple[float, Times]:
        """Play homes; return what the update costs, and its times."""
        self.played += len(homes)
        late = float(self.loads.late(np.array(self.loads.totals(homes)[1])))
        times = self.player.times(named(homes), self.slots)
        return cost_of_times(times, late, self.subgroups, self.window), times

    def shortest(
        self, ranked: list[tuple[float, Codes]], patient: bool = False
    ) -> tuple[float, Codes]:
        """Play homes in their order; return the best and what it costs."""
        best, chosen = math.inf, ranked[0][1]
        for least, homes in ranked:
            hopeless = least_cost(least, self.window) >= best
            tired = self.played + len(homes) > PLAYED_SUBGROUPS and not patient
            if tired and best < math.inf:
                break
            if hopeless:
                continue
            cost, times = self.play(homes)
            if cost < best * (1 - 1e-9):
                best, chosen, self.times = cost, homes, times
        return best, chosen

    def polished(self, best: float, homes: Codes) -> Codes:
        """Give single subgroups another home, or two each other's, while that is played shorter and
        nobody is tired.
        """
        for number, target, other in itertools.islice(polishing_moves(homes), MOST_TRIED):
            if self.played + len(homes) > PLAYED_SUBGROUPS:
                break
            trial = homes.copy()
            trial[number] = target if other is None else homes[other]
            if other is not None:
                trial[other] = homes[number]
            least = self.loads.least_seconds(trial)
            if not self.fits(trial) or least_cost(least, self.window) >= best:
                continue
            cost, times = self.play(trial)
            if cost < best * (1 - 1e-9):
                best, homes, self.times = cost, trial, times
        return homes


def polishing_moves(homes: Codes) -> Iterator[tuple[int, int, int | None]]:
    """Yield a subgroup and its new home, or another with which it changes homes; those at both ends
    first: they decide how lanes fill and drain.
    """
    count = len(homes)
    for place in range(count):
        number = place // 2 if place % 2 else count - 1 - place // 2
        for step in (1, 2):
            yield number, (int(homes[number]) + step) % 3, None
        for other in (number + 1, number + 2, number + 3):
            if other < count:
                yield number, 0, other


def unique(homes: Sequence[Codes]) -> list[Codes]:
    """Return each assignment once."""
    return list({one.tobytes(): one for one in homes}.values())


# ---- predictions ------------------------------------------------------------------------------


def cost_of(prediction: Prediction) -> float:
    """Return what an update costs: exposed seconds, and a little for hidden ones."""
    return prediction.exposed_seconds + WORTH_OF_HIDDEN * prediction.update_seconds


def cost_of_times(
    times: Times, late: float, subgroups: Sequence[Subgroup], window: HiddenWindow
) -> float:
    """Return what a played update costs."""
    exposed = exposed_seconds(times, late, subgroups, window)
    return exposed + WORTH_OF_HIDDEN * (late + times.makespan)


def least_cost(update_seconds: float, window: HiddenWindow) -> float:
    """Return what an update of so many seconds costs at least."""
    # Weights may be new long before the last state is back on the host.
    exposed = update_seconds if window.total == 0.0 else 0.0
    return exposed + WORTH_OF_HIDDEN * update_seconds


def exposed_seconds(
    times: Times, late: float, subgroups: Sequence[Subgroup], window: HiddenWindow
) -> float:
    """Return how long compute waits for an update.

    The next forward pass takes the subgroups in order, each for its share of the pass, and waits
    where its weights are not new yet. An update with nothing to run beside is waited for
    to its end. Backward hides updates but for those whose gradients come last: it reaches what
    forward uses first at its end.
    """
    total = sum(subgroup.elements for subgroup in subgroups) or 1
    clock = late + times.makespan - window.backward if window.forward == 0.0 else 0.0
    before = 0
    for ready, alone, subgroup in zip(times.ready, times.alone, subgroups, strict=True):
        new = late + ready - window.backward
        if window.backward:
            new = max(new, alone - window.backward * before / total)
        clock = max(clock, new)
        before += subgroup.elements
        clock += window.forward * subgroup.elements / total
    return max(0.0, clock - window.forward)


def predicted(
    rates: OffloadRates,
    strategy: str,
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    slots: int,
    window: HiddenWindow,
) -> Schedule:
    """Return a schedule and what it takes: every lane's least time, and what the order of events
    makes of them.
    """
    loads = Loads(rates, subgroups, window, slots)
    times = Player(subgroups, rates).times(homes, slots)
    return described(loads, times, strategy, homes, window)


def described(
    loads: Loads, times: Times, strategy: str, homes: Sequence[Home], window: HiddenWindow
) -> Schedule:
    """Return a schedule with the times that it was played in."""
    codes = np.array([HOMES.index(home) for home in homes], dtype=np.int64)
    seconds, flush, _ = loads.totals(codes)
    late = float(loads.late(np.array(flush)))
    lanes: dict[str, float] = dict(zip(LOADED, seconds.tolist(), strict=True))
    # Slots are no lane of the machine: what they hold up shows in the update's time.
    del lanes["slots"]
    if math.isfinite(window.flush):
        lanes["flush"] = late
    prediction = Prediction(
        update_seconds=late + times.makespan,
        exposed_seconds=exposed_seconds(times, late, loads.subgroups, window),
        lane_seconds=lanes,
        bound_by=max(lanes, key=lambda name: lanes[name]),
    )
    return Schedule(strategy, tuple(loads.subgroups), tuple(homes), loads.slots, prediction)


def predict_homes(profile: HardwareProfile, schedule: Schedule, window: HiddenWindow) -> Schedule:
    """Return a schedule with the times that its homes would take on another machine."""
    again = predicted(
        rates_of(profile),
        schedule.strategy,
        schedule.subgroups,
        schedule.homes,
        schedule.staging_slots,
        window,
    )
    return replace(schedule, prediction=again.prediction)
