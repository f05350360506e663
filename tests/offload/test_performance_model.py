"""The solver: what it promises, what it refuses, and that no simple strategy is better."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.kernels.update import SGD, AdamW
from interlace.offload.fit import memory_needs
from interlace.offload.hardware import HardwareProfile, OffloadRates, load_profile
from interlace.offload.performance_model import (
    compare,
    fixed_homes,
    lower_bound,
    published_stride,
    solve,
)
from interlace.offload.schedule import (
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    MemoryShortage,
    Schedule,
    Subgroup,
)
from interlace.offload.simulator import simulate
from interlace.offload.subgroup import StateLayout

USUAL = Footprint(weight=2, gradient=2, state=12)
SPLIT = Footprint(weight=2, gradient=2, state=12, weight_is_master=True)
PLENTY = MemoryBudget(10**15, 10**15)
H100 = load_profile("4xh100-pcie5")


def equal_subgroups(parameters: float, footprint: Footprint = USUAL) -> list[Subgroup]:
    return [Subgroup(10**8, footprint)] * round(parameters / 1e8)


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    link = 10 ** draw(st.floats(9.5, 11.5))
    rates = OffloadRates(
        ranks_per_node=draw(st.sampled_from([1, 2, 4, 8])),
        h2d_bytes_per_second=link,
        d2h_bytes_per_second=link * draw(st.floats(0.6, 1.0)),
        duplex_efficiency=draw(st.floats(0.55, 1.0)),
        pageable_bytes_per_second=link / 4,
        cpu_update_bytes_per_second=10 ** draw(st.floats(9.5, 11.5)),
        cpu_cast_elements_per_second=1e9,
        device_update_bytes_per_second=10 ** draw(st.floats(11.5, 12.6)),
        host_dram_bytes_per_second=10 ** draw(st.floats(10.5, 12.0)),
        collective_bytes_per_second=1e11,
        network_bytes_per_second=1e10,
    )
    return H100.model_copy(update={"rates": rates})


footprints = st.sampled_from(
    [USUAL, SPLIT, Footprint(4, 4, 12, True), Footprint(2, 2, 8), Footprint(2, 4, 8)]
)
sizes = st.lists(st.integers(10**5, 10**8), min_size=1, max_size=40)


@given(machine=machines(), footprint=footprints, elements=sizes, share=st.floats(0.0, 1.5))
@settings(max_examples=60, deadline=None)
def test_no_schedule_goes_below_the_bound_and_none_beats_the_optimal_one(
    machine: HardwareProfile, footprint: Footprint, elements: list[int], share: float
) -> None:
    subgroups = [Subgroup(size, footprint) for size in elements]
    everything = sum(elements) * footprint.resident_memory
    memory = MemoryBudget(int(share * everything), 10**15)
    bound = lower_bound(machine, subgroups, memory)
    found = compare(machine, subgroups, memory, stride=2)
    best = found["optimal"]
    assert isinstance(best, Schedule)
    for schedule in found.values():
        if isinstance(schedule, Schedule):
            assert simulate(schedule, machine).makespan >= bound * (1 - 1e-6)
            assert schedule.prediction.update_seconds >= bound * (1 - 1e-6)
            assert schedule.prediction.lane_seconds[schedule.prediction.bound_by] >= bound * (
                1 - 1e-6
            )
    for name in ("none", "host"):
        other = found[name]
        if isinstance(other, Schedule):
            assert best.prediction.update_seconds <= other.prediction.update_seconds * (1 + 1e-9)
    needs = memory_needs(best.subgroups, best.homes, best.staging_slots)
    assert needs.device_bytes <= memory.device_bytes


@pytest.mark.parametrize("machine", ["4xh100-pcie5", "4xa100-pcie4", "gh200", "h200"])
@pytest.mark.parametrize("footprint", [USUAL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_with_many_subgroups_the_simulator_meets_the_bound_within_five_percent(
    machine: str, footprint: Footprint, share: float
) -> None:
    profile = load_profile(machine)
    subgroups = [Subgroup(10**8, footprint)] * 600
    everything = 6 * 10**10 * footprint.resident_memory
    memory = MemoryBudget(int(share * everything), 10**15)
    schedule = solve(profile, subgroups, memory, staging_slots=3)
    makespan = simulate(schedule, profile).makespan
    bound = lower_bound(profile, subgroups, memory, staging_slots=3)
    assert bound * (1 - 1e-9) <= makespan <= 1.05 * bound


@pytest.mark.parametrize(
    ("machine", "parameters", "footprint", "expected"),
    [
        ("4xh100-pcie5", 15.33e9, USUAL, 0.81),
        ("4xa100-pcie4", 15.58e9, USUAL, 2.15),
        ("4xh100-pcie5", 15.33e9, SPLIT, 0.68),
        ("4xa100-pcie4", 15.58e9, SPLIT, 1.79),
    ],
)
def test_the_best_split_of_the_published_testbeds(
    machine: str, parameters: float, footprint: Footprint, expected: float
) -> None:
    """Linear-program optima computed by hand for these machines, one-pass CPU update."""
    profile = load_profile(machine)
    subgroups = equal_subgroups(parameters / 4, footprint)
    # Room for slots and kept gradients, none for residents.
    room = int(2 * 1e8 * footprint.staged_copy + parameters / 4 * footprint.gradient)
    schedule = solve(profile, subgroups, MemoryBudget(room, 10**15))
    assert schedule.prediction.update_seconds == pytest.approx(expected, rel=0.10)
    assert schedule.elements(Home.STAGED) > 0.9 * parameters / 4


@pytest.mark.parametrize(
    ("machine", "parameters", "expected"),
    [("4xh100-pcie5", 15.33e9, 1.16), ("4xa100-pcie4", 15.58e9, 2.90)],
)
def test_all_on_the_host(machine: str, parameters: float, expected: float) -> None:
    subgroups = equal_subgroups(parameters / 4)
    schedule = solve(load_profile(machine), subgroups, PLENTY, strategy="host")
    assert schedule.prediction.update_seconds == pytest.approx(expected, rel=0.10)
    assert schedule.prediction.bound_by == "cpu"


def test_the_published_rule_takes_every_second_subgroup_on_both_testbeds() -> None:
    assert published_stride(H100, USUAL) == 2
    assert published_stride(load_profile("4xa100-pcie4"), USUAL) == 2
    homes = solve(H100, equal_subgroups(2e9), PLENTY, strategy="stride").homes
    assert homes == (Home.HOST, Home.STAGED) * 10


def test_a_slow_link_raises_the_published_stride() -> None:
    rates = H100.rates
    assert rates is not None
    slow = rates.model_copy(update={"h2d_bytes_per_second": 5e9})
    assert published_stride(H100.model_copy(update={"rates": slow}), USUAL) == 9


def test_ten_thousand_subgroups_take_less_than_a_second() -> None:
    generator = torch.Generator().manual_seed(0)
    elements = torch.randint(10**6, 10**8, (10_000,), generator=generator).tolist()
    subgroups = [Subgroup(size, USUAL) for size in elements]
    times: list[float] = []
    for share in (0.1, 0.5, 0.9):
        room = MemoryBudget(int(share * 14 * sum(elements)), 10**15)
        start = time.perf_counter()
        solve(H100, subgroups, room)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_residents_fill_what_the_budget_leaves() -> None:
    subgroups = equal_subgroups(4e9)
    for share in (0.3, 0.6):
        room = int(share * 4e9 * USUAL.resident_memory)
        schedule = solve(H100, subgroups, MemoryBudget(room, 10**15))
        needs = memory_needs(schedule.subgroups, schedule.homes, 2)
        one_more = 10**8 * USUAL.resident_memory
        assert room - one_more < needs.device_bytes <= room


def test_a_hidden_window_is_not_exposed_and_a_short_flush_is() -> None:
    subgroups = equal_subgroups(4e9)
    alone = solve(H100, subgroups, PLENTY, strategy="host").prediction
    assert alone.exposed_seconds == alone.update_seconds
    window = HiddenWindow(forward=0.5)
    beside = solve(H100, subgroups, PLENTY, window, strategy="host").prediction
    assert beside.exposed_seconds == pytest.approx(alone.update_seconds - 0.5)
    slow = solve(H100, subgroups, PLENTY, HiddenWindow(flush=0.0), strategy="host").prediction
    flush = 4e9 * 2 / 55.2e9
    assert slow.update_seconds == pytest.approx(alone.update_seconds + flush)


def test_too_little_memory_names_need_budget_and_setting() -> None:
    subgroups = equal_subgroups(1e9)
    with pytest.raises(MemoryShortage) as device:
        solve(H100, subgroups, MemoryBudget(2**30, 10**15), strategy="none")
    assert str(device.value) == (
        "offload.strategy=none: optimizer state needs 13.0 GiB of device memory and may have 1.0 "
        "GiB; set offload.device_budget_gib higher, offload.strategy=optimal or host, or smaller "
        "offload.subgroup_elements"
    )
    with pytest.raises(MemoryShortage) as host:
        solve(H100, subgroups, MemoryBudget(0, 2**30))
    assert str(host.value) == (
        "offload.strategy=optimal: optimizer state needs 14.9 GiB of host memory and may have 1.0 "
        "GiB; set offload.host_budget_gib higher, offload.moments=bfloat16, "
        "offload.device_budget_gib higher (what is resident leaves the host), or spread the model "
        "over more ranks"
    )


def test_wrong_arguments_are_refused() -> None:
    subgroups = equal_subgroups(1e9)
    with pytest.raises(ValueError, match="strategy='best': must be one of none, host"):
        solve(H100, subgroups, PLENTY, strategy="best")
    with pytest.raises(ValueError, match="stride=0: must be 1 or more"):
        solve(H100, subgroups, PLENTY, strategy="stride", stride=0)
    with pytest.raises(ValueError, match="has no copy and update rates"):
        solve(H100.model_copy(update={"rates": None}), subgroups, PLENTY)


def test_mixed_footprints_are_each_cut_to_their_share() -> None:
    pairs = [(Subgroup(10**8, USUAL), Subgroup(10**8, Footprint(4, 4, 12, True)))] * 20
    subgroups = list(itertools.chain.from_iterable(pairs))
    schedule = solve(H100, subgroups, MemoryBudget(20 * 10**9, 10**15))
    assert len(schedule.homes) == 40
    bound = lower_bound(H100, subgroups, MemoryBudget(20 * 10**9, 10**15))
    expected = schedule.prediction
    assert expected.lane_seconds[expected.bound_by] <= 1.05 * bound


@pytest.mark.parametrize(
    ("rule", "moments", "split", "state", "resident"),
    [
        (AdamW(), torch.float32, False, 12, 14),
        (AdamW(), torch.float32, True, 12, 12),
        (AdamW(), torch.bfloat16, False, 8, 10),
        (AdamW(), torch.bfloat16, True, 8, 8),
        (SGD(), torch.float32, False, 8, 10),
        (SGD(), torch.bfloat16, True, 6, 6),
    ],
)
def test_bytes_per_parameter_follow_from_rule_and_precision(
    rule: AdamW | SGD, moments: torch.dtype, split: bool, state: int, resident: int
) -> None:
    footprint = StateLayout(rule, moments, split).footprint(torch.bfloat16, torch.bfloat16)
    assert footprint.state == state
    assert footprint.resident_memory == resident


def test_the_byte_counts_of_the_usual_state() -> None:
    """Counted by hand: one-pass update, bf16 weights and gradients, fp32 state."""
    assert (USUAL.host_dram, USUAL.staged_dram, USUAL.host_update) == (32, 24, 28)
    assert (SPLIT.host_dram, SPLIT.staged_dram, SPLIT.host_update) == (30, 20, 26)
    assert fixed_homes("optimal", 3, None) is None
