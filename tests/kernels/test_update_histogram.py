"""Quantiles from histograms against exact ones."""

import pytest
import torch

from interlace.kernels.update import BINS, magnitude_histogram, quantile_of
from interlace.kernels.update.histogram import lower_edge

SEED = 5
GREATEST = torch.finfo(torch.float32).max


def draw(name: str) -> torch.Tensor:
    """Return gradients of one kind, float32."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(20_000, generator=generator)
    return {
        "normal": normal * 1e-3,
        # A ratio of normals has no mean.
        "heavy-tailed": normal / torch.randn(20_000, generator=generator),
        "all equal": torch.full((1000,), -0.013),
        "one element": torch.tensor([0.25]),
        "half zeros": normal * (torch.arange(20_000) % 2),
        "denormal": normal * 1e-39,
        "huge": normal.clamp(-3, 3) * 1e38,
        "sixteen powers": 2.0 ** torch.arange(-8.0, 8.0),
    }[name]


KINDS = (
    "normal",
    "heavy-tailed",
    "all equal",
    "one element",
    "half zeros",
    "denormal",
    "huge",
    "sixteen powers",
)


def exact(magnitudes: torch.Tensor, share: float) -> float:
    """Return the largest magnitude that at least a share of all reaches."""
    ordered = magnitudes.double().sort(descending=True).values
    return float(ordered[int(share * len(ordered))])


def bin_of(magnitude: float) -> int:
    """Return the bin of a number, from its pattern."""
    return int(torch.tensor(magnitude, dtype=torch.float32).view(torch.int32)) >> 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_quantile_is_within_one_bin_of_the_exact_one(kind: str, share: float) -> None:
    values = draw(kind)
    magnitudes = values[values != 0].abs()
    histogram = magnitude_histogram(values)
    assert int(histogram.sum()) == magnitudes.numel()
    found = quantile_of(histogram, share)
    assert abs(bin_of(found) - bin_of(exact(magnitudes, share))) <= 1
    if kind in ("normal", "heavy-tailed", "half zeros"):
        # Interpolated, it is far closer: what torch interpolates between neighbours.
        reference = float(torch.quantile(magnitudes.double(), 1.0 - share))
        assert found == pytest.approx(reference, rel=0.02)


def test_the_share_above_the_quantile_is_the_one_asked_for() -> None:
    values = draw("normal")
    threshold = quantile_of(magnitude_histogram(values), 0.1)
    assert float((values.abs() > threshold).double().mean()) == pytest.approx(0.1, abs=0.003)


def test_zeros_count_where_the_total_says_so() -> None:
    values = draw("half zeros")
    histogram = magnitude_histogram(values)
    among_all = quantile_of(histogram, 0.1, total=len(values))
    assert abs(bin_of(among_all) - bin_of(exact(values.abs(), 0.1))) <= 1
    assert among_all == quantile_of(histogram, 0.2, total=len(values) // 2)
    # More than half are zeros, and so is the quantile.
    assert quantile_of(histogram, 0.6, total=len(values)) == 0.0


def test_nothing_but_zeros_has_quantile_zero() -> None:
    for values in (torch.zeros(100), torch.zeros(0), -torch.zeros(3)):
        histogram = magnitude_histogram(values)
        assert histogram.shape == (BINS,) and histogram.dtype == torch.int64
        assert int(histogram.sum()) == 0
        assert quantile_of(histogram, 0.1) == 0.0
        assert quantile_of(histogram, 0.1, total=100) == 0.0


def test_what_is_not_finite_is_not_counted_also_not_after_scaling() -> None:
    values = torch.tensor([1.0, -torch.inf, torch.nan, torch.inf, 1e30, 0.0, 1e-30])
    assert int(magnitude_histogram(values).sum()) == 3
    assert int(magnitude_histogram(values, 1e20).sum()) == 2
    assert int(magnitude_histogram(values, 1e-20).sum()) == 2


def test_bins_are_in_the_order_of_numbers_and_an_eighth_of_a_power_of_two_wide() -> None:
    edges = [lower_edge(place) for place in range(BINS + 1)]
    assert edges == sorted(set(edges))
    for place in (0, 1, 7, 8, 9, 500, 1016, 1017, 2039):
        number = torch.tensor(place << 20, dtype=torch.int32).view(torch.float32)
        assert float(number) == edges[place]
    one = magnitude_histogram(torch.tensor([1.0, 1.124, 1.125, -1.0]))
    assert one.nonzero().flatten().tolist() == [1016, 1017]
    assert one[1016:1018].tolist() == [3, 1]
    assert quantile_of(magnitude_histogram(torch.full((9,), GREATEST)), 0.01) <= GREATEST


def test_histograms_of_parts_add_up_to_that_of_all() -> None:
    values = draw("heavy-tailed")
    parts = sum(magnitude_histogram(part, 0.3) for part in values.split(700))
    assert torch.equal(torch.as_tensor(parts), magnitude_histogram(values, 0.3))


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-38])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_without_a_kernel_count_the_same(kind: str, scale: float) -> None:
    values = draw(kind)
    found = magnitude_histogram(values, scale)
    # float64 goes the way of a GPU.
    assert torch.equal(magnitude_histogram(values.double(), scale), found)
    narrow = values.bfloat16()
    wide = narrow.float()
    assert torch.equal(magnitude_histogram(narrow, scale), magnitude_histogram(wide, scale))
