"""The order of rows: a bijection per epoch, shares by weight, nothing but arithmetic."""

import itertools
from collections import Counter

import pytest

from interlace.trainer.data.order import SLOTS, Mixture, Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_a_permutation_meets_every_number_once(size: int, seed: int) -> None:
    assert sorted(map(Permutation(size, seed), range(size))) == list(range(size))


def test_a_permutation_of_huge_size_needs_no_table() -> None:
    huge = Permutation(10**15, seed=3)
    images = [huge(number) for number in range(1000)]
    assert len(set(images)) == 1000
    assert max(images) > 10**14


def test_permutations_look_random() -> None:
    first = [Permutation(50, seed)(0) for seed in range(5000)]
    counts = Counter(first)
    expected = 5000 / 50
    statistic = sum((counts[n] - expected) ** 2 / expected for n in range(50))
    # Chi-square with 49 degrees of freedom exceeds 94 with probability 1e-4.
    assert statistic < 94


def test_neighbours_are_torn_apart() -> None:
    order = list(map(Permutation(1000, 0), range(1000)))
    assert sum(abs(b - a) == 1 for a, b in itertools.pairwise(order)) < 12


def test_numbers_outside_are_refused() -> None:
    with pytest.raises(IndexError, match=r"5 is outside range\(5\)"):
        Permutation(5, 0)(5)
    with pytest.raises(ValueError, match="at least one element, got 0"):
        Permutation(0, 0)


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.7, 0.2, 0.1), (1000.0, 1e-9)])
def test_sources_get_their_share_within_one_slot(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights, [100] * len(weights), seed=1)
    counts = Counter(mixture[number].source for number in range(SLOTS))
    for source, weight in enumerate(weights):
        share = counts[source] / SLOTS
        assert counts[source] >= 1
        assert abs(share - weight / sum(weights)) <= 1 / SLOTS


def test_every_row_of_a_source_comes_once_in_each_epoch() -> None:
    mixture = Mixture((2.0, 1.0), (37, 11), seed=5)
    met: dict[int, list[int]] = {0: [], 1: []}
    for number in range(3 * SLOTS):
        source, row = mixture[number]
        met[source].append(row)
    for source, count in ((0, 37), (1, 11)):
        epochs = [met[source][n : n + count] for n in range(0, len(met[source]) - count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_row_depends_on_its_number_alone() -> None:
    forward = Mixture((1.0, 1.0), (50, 60), seed=9)
    backward = Mixture((1.0, 1.0), (50, 60), seed=9)
    numbers = range(500)
    in_order = [forward[n] for n in numbers]
    assert [backward[n] for n in reversed(numbers)] == in_order[::-1]
    assert [Mixture((1.0, 1.0), (50, 60), seed=10)[n] for n in numbers] != in_order
