"""How often to save: the published optimum, its bounds, and a clock that only rank 0 looks at."""

import math

import pytest

from interlace.trainer.checkpoint.interval import Costs, interval_seconds
from interlace.trainer.checkpoint.pace import Pace
from interlace.trainer.config.checkpoint_section import CheckpointSection

HOUR = 3600.0


def lost_share(interval: float, costs: Costs, hours: float, restart_seconds: float) -> float:
    """Return the share of the time that saves and failures cost: what stalls, half an interval of
    work for each failure, what was not persisted yet, and the restart.
    """
    per_failure = interval / 2 + costs.persist + restart_seconds
    return costs.stall / interval + per_failure / (HOUR * hours)


@pytest.mark.parametrize(
    ("between_failures", "stall", "best", "lost"),
    [
        (11_140.0, 10.0, 472.0, (0.021, 0.021, 0.032)),
        (52_300.0, 5.0, 723.0, (0.007, 0.007, 0.007)),
        (418_500.0, 5.0, 2046.0, (0.0024, 0.0024, 0.0009)),
        (2_851_000.0, 5.0, 5340.0, (0.0009, 0.0009, 0.0001)),
    ],
)
def test_the_interval_is_young_s_up_to_half_an_hour(
    between_failures: float, stall: float, best: float, lost: tuple[float, float, float]
) -> None:
    costs = Costs(stall, persist=60.0)
    found = interval_seconds(costs, between_failures / HOUR, step_seconds=1.0)
    assert found == pytest.approx(min(best, 1800.0), rel=2e-3)
    share = lost_share(best, costs, between_failures / HOUR, restart_seconds=300.0)
    assert share == pytest.approx(sum(lost), abs=2e-3)


@pytest.mark.parametrize("between_failures", [0.1, 3.0, 200.0])
@pytest.mark.parametrize("stall", [0.01, 2.0])
def test_no_other_interval_loses_less(between_failures: float, stall: float) -> None:
    costs = Costs(stall, persist=0.0)
    best = interval_seconds(costs, between_failures, step_seconds=0.0)
    if best < 1800.0:
        least = lost_share(best, costs, between_failures, 0.0)
        for other in (0.5 * best, 0.9 * best, 1.1 * best, 2.0 * best):
            assert lost_share(other, costs, between_failures, 0.0) > least


def test_the_interval_is_no_shorter_than_a_save_or_a_step() -> None:
    costs = Costs(stall=0.001, persist=90.0)
    assert interval_seconds(costs, 1.0, step_seconds=1.0) == 90.0
    assert interval_seconds(costs, 1.0, step_seconds=200.0) == 200.0
    assert interval_seconds(Costs(5.0, 4000.0), 1000.0, step_seconds=1.0) == 4000.0


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pace_of(clock: Clock, **settings: object) -> Pace:
    section = CheckpointSection.model_validate({"every": "auto", **settings})
    return Pace(section, steps=10_000, clock=clock)


def test_an_automatic_run_saves_early_and_then_as_often_as_costs_least() -> None:
    clock = Clock()
    pace = pace_of(clock, hours_between_failures=2.0)
    asked = []
    for _ in range(3):
        asked.append(pace.is_time())
        clock.now += 10.0
        pace.step_done()
    assert asked == [False, True, True]
    pace.begun()
    assert not pace.is_time()
    told = pace.learn(Costs(stall=0.25, persist=3.0))
    # The root of 2 * 0.25 * 7200.
    assert told == (
        "a checkpoint every 60 s from now on: a save stalls training 0.25 s and takes 3.0 s, and a "
        "failure is expected every 2 h"
    )
    clock.now += 59.0
    assert not pace.is_time()
    clock.now += 1.0
    assert pace.is_time()


def test_a_new_interval_is_told_and_a_similar_one_is_not() -> None:
    pace = pace_of(Clock())
    assert pace.learn(Costs(0.2, 1.0)) is not None
    assert pace.learn(Costs(0.21, 1.0)) is None
    told = pace.learn(Costs(3.0, 1.0))
    assert told is not None
    assert math.isclose(pace.interval, math.sqrt(2 * (3.41 / 3) * 24 * HOUR))


def test_a_save_that_failed_is_repeated_after_a_while_though_nothing_is_known() -> None:
    clock = Clock()
    pace = pace_of(clock)
    pace.begun()
    assert not pace.is_time()
    clock.now += 60.0
    assert pace.is_time()


def test_ranks_save_when_rank_0_says_so_and_never_by_their_own_clock() -> None:
    clock = Clock()
    pace = pace_of(clock)
    clock.now += 1e6
    assert not pace.is_due(10, agreed=False)
    assert pace.is_due(10, agreed=True)
    assert not pace.is_due(10_000, agreed=True)


def test_steps_decide_where_the_recipe_names_them() -> None:
    pace = Pace(CheckpointSection(every_steps=5), steps=20, clock=Clock())
    due = [step for step in range(1, 21) if pace.is_due(step, agreed=False)]
    assert due == [5, 10, 15]
    assert not pace.is_time()
    assert Pace(CheckpointSection(every_steps=0), 20).is_due(5, agreed=False) is False
