"""The edges of the learning rate: no warm-up, no decay, whole-run decay, the end and beyond it."""

from typing import Any

import pytest

from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.schedules import learning_rate

SCHEDULES = ("constant", "cosine", "wsd")


def rate(step: int, steps: int, schedule: str, **settings: Any) -> float:
    section = OptimizerSection.model_validate({"peak_lr": 2.0, "schedule": schedule, **settings})
    return learning_rate(step, steps, section)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_peak_comes_at_the_first_step_after_warmup(schedule: str) -> None:
    assert rate(9, 100, schedule, warmup_steps=10) < 2.0
    assert rate(10, 100, schedule, warmup_steps=10) == 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert rate(0, 100, schedule, warmup_steps=0) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_end_of_the_run_is_at_the_final_fraction_and_stays_there(
    schedule: str, fraction: float
) -> None:
    for step in (100, 101, 1000):
        given = rate(step, 100, schedule, warmup_steps=10, final_lr_fraction=fraction)
        assert given == pytest.approx(2.0 * fraction)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_never_rises_after_warmup_and_the_last_step_still_moves(schedule: str) -> None:
    given = [rate(step, 100, schedule, warmup_steps=10) for step in range(10, 100)]
    assert given == sorted(given, reverse=True)
    assert given[-1] > 0.0


def test_wsd_starts_to_fall_after_the_step_that_leaves_its_share() -> None:
    assert rate(60, 100, "wsd", warmup_steps=0, decay_fraction=0.4) == 2.0
    assert rate(61, 100, "wsd", warmup_steps=0, decay_fraction=0.4) == 2.0 * 39 / 40


def test_wsd_can_decay_not_at_all_or_all_the_way() -> None:
    never = [rate(step, 8, "wsd", warmup_steps=0, decay_fraction=0.0) for step in range(10)]
    always = [rate(step, 8, "wsd", warmup_steps=0, decay_fraction=1.0) for step in range(8)]
    assert never == [2.0] * 10
    assert always == pytest.approx([2.0 * (8 - step) / 8 for step in range(8)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 50])
def test_a_run_of_one_step_has_a_rate_above_zero(schedule: str, warmup_steps: int) -> None:
    assert 0.0 < rate(0, 1, schedule, warmup_steps=warmup_steps, decay_fraction=0.4) <= 2.0
