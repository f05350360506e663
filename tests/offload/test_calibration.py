"""Recalibration against machines whose truth is known: it finds what is wrong, and stops."""

from collections.abc import Sequence

import pytest

from interlace.offload.calibration import PATIENCE, REST, Calibration, Probation
from interlace.offload.hardware import HardwareProfile, OffloadRates, load_profile
from interlace.offload.performance_model import predict_homes, solve
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import (
    NOTHING_HIDDEN,
    Footprint,
    Home,
    MemoryBudget,
    Schedule,
    Subgroup,
)
from interlace.offload.simulator import simulate
from interlace.offload.timeline import Timeline, TimelineEvent

MACHINES = ["4xh100-pcie5", "4xa100-pcie4", "h200"]
RATES = [
    "h2d_bytes_per_second",
    "d2h_bytes_per_second",
    "cpu_update_bytes_per_second",
    "device_update_bytes_per_second",
    "host_dram_bytes_per_second",
]
MIXES = {
    "host": [Home.HOST],
    "staged": [Home.STAGED],
    "mixed": [Home.HOST, Home.STAGED, Home.RESIDENT],
}


def changed(profile: HardwareProfile, name: str, factor: float) -> HardwareProfile:
    assert profile.rates is not None
    rates = profile.rates.model_dump()
    return profile.model_copy(
        update={"rates": OffloadRates.model_validate(rates | {name: rates[name] * factor})}
    )


def a_schedule(profile: HardwareProfile, mix: Sequence[Home], count: int = 30) -> Schedule:
    subgroups = [Subgroup(10**8, Footprint(2, 2, 12))] * count
    base = solve(profile, subgroups, MemoryBudget(10**15, 10**15), strategy="host")
    homes = tuple(mix[n % len(mix)] for n in range(count))
    return at_homes(profile, base, homes)


def at_homes(profile: HardwareProfile, schedule: Schedule, homes: Sequence[Home]) -> Schedule:
    same = Schedule(
        "optimal", schedule.subgroups, tuple(homes), schedule.staging_slots, schedule.prediction
    )
    return predict_homes(profile, same, NOTHING_HIDDEN)


def measured(schedule: Schedule, truth: HardwareProfile) -> UpdateReport:
    timeline = simulate(schedule, truth)
    return UpdateReport(1, timeline, timeline.makespan, 0.0, schedule.prediction)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("factor", [1 / 3, 3.0])
@pytest.mark.parametrize("wrong", RATES)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_rate_that_is_three_times_wrong_is_found_or_does_not_matter(
    machine: str, wrong: str, factor: float, mix: str
) -> None:
    truth = load_profile(machine)
    calibration = Calibration(changed(truth, wrong, factor))
    schedule = a_schedule(calibration.profile, MIXES[mix])
    for _ in range(3 * (PATIENCE + REST)):
        report = measured(schedule, truth)
        if calibration.notice(report, schedule):
            calibration.correct(schedule)
            schedule = at_homes(calibration.profile, schedule, schedule.homes)
    actual = simulate(schedule, truth).makespan
    assert schedule.prediction.update_seconds == pytest.approx(actual, rel=0.10)


def test_a_belief_that_explains_the_measurement_is_kept() -> None:
    truth = load_profile("h200")
    calibration = Calibration(truth)
    schedule = a_schedule(truth, MIXES["mixed"])
    report = measured(schedule, truth)
    for _ in range(20):
        assert not calibration.notice(report, schedule)
    calibration.correct(schedule)
    assert calibration.profile == truth


def test_updates_spread_over_backward_are_judged_by_their_lanes() -> None:
    """The same work with pauses between: as long as backward, and nothing is wrong."""
    truth = load_profile("4xh100-pcie5")
    schedule = a_schedule(truth, MIXES["host"])
    events = [
        TimelineEvent(e.lane, e.what, e.subgroup, e.start + e.subgroup, e.stop + e.subgroup, 1)
        for e in simulate(schedule, truth).events
    ]
    events.append(TimelineEvent("d2h", "gradient", 29, 28.0, 29.0, 1))
    spread = UpdateReport(1, Timeline(tuple(events)), 30.0, 0.0, schedule.prediction)
    assert spread.spread_over_backward
    assert "spread over backward" in spread.words()
    calibration = Calibration(truth)
    assert not any(calibration.notice(spread, schedule) for _ in range(20))
    slow = Calibration(changed(truth, "cpu_update_bytes_per_second", 2.0))
    believed = at_homes(slow.profile, schedule, schedule.homes)
    assert any(slow.notice(spread, believed) for _ in range(20))
    slow.correct(believed)
    assert slow.profile.rates is not None
    assert truth.rates is not None
    assert slow.profile.rates.cpu_update_bytes_per_second == pytest.approx(
        truth.rates.cpu_update_bytes_per_second, rel=0.05
    )


def test_homes_that_turn_out_slower_are_given_up_for_good() -> None:
    old, new = (Home.HOST,) * 3, (Home.STAGED,) * 3
    probation = Probation()
    assert probation.notice(1.0, old) is None
    probation.begin(old, 1.0)
    verdicts = [probation.notice(seconds, new) for seconds in (9.0, 1.2, 1.3, 1.1, 1.2)]
    assert verdicts == [None, None, None, old, None]
    assert probation.refused == {new}
    probation.begin(old, 1.0)
    assert [probation.notice(0.9, new) for _ in range(6)] == [None] * 6
