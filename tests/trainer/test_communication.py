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
