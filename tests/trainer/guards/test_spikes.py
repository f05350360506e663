"""The spike rule: its numbers against exact fractions, what it lets through, and what it keeps."""

import json
import math
import random
from fractions import Fraction

import pytest

from interlace.trainer.checkpoint.state import Progress
from interlace.trainer.guards.spikes import STOP_WITHIN, SpikeMemory, limit_of, spike_in

WINDOW = 128


def noisy_losses(count: int, seed: int) -> list[float]:
    """A loss that falls as a power of the step, with noise of a fiftieth."""
    draw = random.Random(seed)
    return [2.0 + 8.0 * (step + 10) ** -0.3 + draw.gauss(0.0, 0.05) for step in range(count)]


def noisy_norms(count: int, seed: int) -> list[float]:
    """Gradient norms as they come: positive, spread by a quarter, with a tail to the right."""
    draw = random.Random(seed)
    return [draw.lognormvariate(0.0, 0.25) for _ in range(count)]


@pytest.mark.parametrize("count", [64, 100, 128, 200])
def test_the_limit_is_that_of_exact_arithmetic(count: int) -> None:
    values = noisy_losses(count, seed=1)
    exact = [Fraction(value) for value in values[-WINDOW:]]
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
    assert limit_of(values, 6.0, WINDOW) == pytest.approx(
        float(mean) + 6.0 * math.sqrt(float(variance)), rel=1e-14
    )


def test_nothing_is_a_spike_before_half_a_window_is_known() -> None:
    assert limit_of(noisy_losses(63, seed=1), 6.0, WINDOW) == math.inf
    assert limit_of(noisy_losses(64, seed=1), 6.0, WINDOW) < 10.0


def walk(losses: list[float], norms: list[float]) -> tuple[SpikeMemory, list[int]]:
    """Judge step after step, at 6 sigmas; return the memory and the steps, from 1, skipped."""
    memory, skipped = SpikeMemory(), list[int]()
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        if spike_in(memory, loss, norm, 6.0, WINDOW):
            memory = memory.after_skip(step)
            skipped.append(step)
        else:
            memory = memory.accepted(loss, norm, WINDOW)
    return memory, skipped


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_clean_steps_have_no_spike(seed: int) -> None:
    _, skipped = walk(noisy_losses(1000, seed), noisy_norms(1000, seed))
    assert skipped == []


def test_ten_times_the_norm_after_128_clean_steps_is_one_and_does_not_widen_the_window() -> None:
    losses, norms = noisy_losses(300, seed=0), noisy_norms(300, seed=0)
    norms[128] *= 10
    norms[129] *= 10
    memory, skipped = walk(losses, norms)
    assert skipped == [129, 130]
    assert memory.skipped == 2
    assert max(memory.norms) < 5.0


def test_a_loss_that_jumps_is_one_whatever_the_norm() -> None:
    losses, norms = noisy_losses(200, seed=0), noisy_norms(200, seed=0)
    losses[150] += 4.0
    assert walk(losses, norms)[1] == [151]


def test_a_series_that_stands_still_has_no_spike_but_a_rise_is_one() -> None:
    still = SpikeMemory(losses=(0.1,) * WINDOW, norms=(0.3,) * WINDOW)
    assert spike_in(still, 0.1, 0.3, 6.0, WINDOW) is None
    assert spike_in(still, 0.101, 0.3, 6.0, WINDOW) == "loss 0.101 is above 0.1"


def test_without_sigmas_there_is_no_rule() -> None:
    still = SpikeMemory(losses=(0.1,) * WINDOW, norms=(0.3,) * WINDOW)
    assert spike_in(still, 1e9, 1e9, 0.0, WINDOW) is None


def test_old_spikes_are_forgotten() -> None:
    memory = SpikeMemory()
    for step in (1, 2, 2 + STOP_WITHIN - 1, 2 + STOP_WITHIN):
        memory = memory.after_skip(step)
    assert memory.recent == (2 + STOP_WITHIN - 1, 2 + STOP_WITHIN)
    assert memory.skipped == 4


def test_the_memory_survives_a_checkpoint_bit_by_bit() -> None:
    memory, _ = walk(noisy_losses(200, seed=3), noisy_norms(200, seed=3))
    text = json.dumps(Progress(step=200, spikes=memory).model_dump(mode="json"))
    again = Progress.model_validate(json.loads(text)).spikes
    assert [value.hex() for value in again.losses] == [value.hex() for value in memory.losses]
    assert again == memory
