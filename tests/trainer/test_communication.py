"""Traffic of sharding, by hand."""

import pytest

from interlace.offload.hardware import load_profile
from interlace.trainer.communication import Traffic, communication_seconds

RATES = load_profile("4xh100-pcie5").rates
assert RATES is not None
INSIDE, BETWEEN = RATES.collective_bytes_per_second, RATES.network_bytes_per_second


def seconds(ranks: int, replicas: int = 1, passes: int = 1) -> float:
    return communication_seconds(Traffic(10**9, 2, ranks, 4, replicas, passes), RATES)


def test_one_rank_sends_nothing_and_passes_add_up() -> None:
    assert seconds(1) == 0.0
    assert seconds(8, passes=3) == pytest.approx(3 * seconds(8))
    assert communication_seconds(Traffic(10**9, 2, 8, 4, 1, 1), None) == 0.0


def test_inside_a_node_a_rank_receives_all_but_its_share() -> None:
    # Two gathers of 2 bytes, one reduction of 4.
    assert seconds(4) == pytest.approx(8e9 * 3 / 4 / INSIDE)


def test_between_nodes_all_adapters_of_a_node_bring_in_what_it_lacks() -> None:
    within, between = 8e9 * 7 / 8 / INSIDE, 8e9 / 2 / (4 * BETWEEN)
    assert seconds(8) == pytest.approx(max(within, between))
    # More nodes cost next to nothing more: never several times as much as two.
    assert seconds(64) < 2.1 * seconds(8)


def test_replicas_gather_inside_their_nodes_and_sum_shards_across() -> None:
    expected = 8e9 * 3 / 4 / INSIDE + 2 * 1e9 * 1 / 2 / BETWEEN
    assert seconds(8, replicas=2) == pytest.approx(expected)


def zero_seconds(stage: int, passes: int, parameters: int = 10**9) -> float:
    return communication_seconds(Traffic(parameters, 2, 4, 4, 1, passes, stage), RATES)


def test_zero_1_sums_once_in_a_step_and_zero_2_in_every_pass() -> None:
    # An all-reduce of 4 bytes is two collectives; the new weights of 2 bytes are gathered once.
    once, weights = 8e9 * 3 / 4 / INSIDE, 2e9 * 3 / 4 / INSIDE
    assert zero_seconds(1, 5) == pytest.approx(once + weights)
    assert zero_seconds(2, 5) == pytest.approx(5 * once + weights)


def test_zero_3_gathers_again_for_backward_what_it_has_not_kept() -> None:
    first, again, gradients = 2e9, 2 * 0.5e9, 4e9
    expected = 5 * (first + again + gradients) * 3 / 4 / INSIDE
    assert zero_seconds(3, 5) == pytest.approx(expected)
    small = 5 * (2e8 + 4e8) * 3 / 4 / INSIDE
    assert zero_seconds(3, 5, parameters=10**8) == pytest.approx(small)
