"""The verdict on transfer is right about valleys whose optimum is known."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from interlace.trainer.mup.transfer import (
    DRIFT_LIMIT,
    REGRET_LIMIT,
    Valley,
    interval,
    judge,
    loss_above,
    optimum_of,
    parabola_through,
    slope,
    transferred_rate,
    vertex,
)

RATES = tuple(float(rate) for rate in range(-10, -2))
Loss = Callable[[float], float]


def bowl(centre: float, floor: float = 2.0, steepness: float = 0.02) -> Loss:
    """A parabola over log2 of the learning rate."""
    return lambda rate: floor + steepness * (rate - centre) ** 2


def valley(width: int, loss: Loss, shifts: Sequence[float] = (0.0,)) -> Valley:
    """A width whose seeds see the same curve, each shifted up or down."""
    losses = {rate: tuple(loss(rate) + shift for shift in shifts) for rate in RATES}
    return Valley(width, losses, {})


@pytest.mark.parametrize("centre", [-7.0, -6.6, -6.5, -5.01, -8.25])
def test_the_vertex_of_a_parabola_is_found_between_the_points(centre: float) -> None:
    assert vertex({rate: bowl(centre)(rate) for rate in RATES}) == pytest.approx(centre, abs=1e-9)


def test_the_vertex_is_that_of_a_parabola_by_least_squares() -> None:
    generator = np.random.default_rng(0)
    rates = np.array([-7.0, -6.0, -5.0, -4.0, -3.0])
    losses = 2 + 0.03 * (rates + 5.2) ** 2 + 0.001 * generator.standard_normal(5)
    design = np.stack([np.ones(5), rates, rates**2], axis=1)
    _, slope_, curvature = np.linalg.solve(design.T @ design, design.T @ losses)
    means = dict(zip(rates.tolist(), losses.tolist(), strict=True))
    assert vertex(means) == pytest.approx(-slope_ / (2 * curvature), rel=1e-9)


def test_points_far_above_the_valley_do_not_bend_the_parabola() -> None:
    inside = {rate: bowl(-6.4)(rate) for rate in (-8.0, -7.0, -6.0, -5.0)}
    assert vertex(inside | {-4.0: 9.0}) == pytest.approx(-6.4, abs=1e-9)
    # With it in the valley, the optimum would be elsewhere.
    rates = [*inside, -4.0]
    assert parabola_through(rates, [*inside.values(), 9.0]) != pytest.approx(-6.4, abs=0.2)


def test_steps_of_any_width_give_the_same_vertex() -> None:
    halves = {-8 + 0.5 * n: bowl(-6.3)(-8 + 0.5 * n) for n in range(9)}
    assert vertex(halves) == pytest.approx(-6.3, abs=1e-9)


@pytest.mark.parametrize("centre", [-20.0, -10.0, -3.0, 5.0])
def test_an_optimum_at_an_edge_is_none(centre: float) -> None:
    found = judge([valley(32, bowl(-6.0)), valley(64, bowl(centre))])
    assert found.optima[1].log2_lr is None
    assert found.optima[1].lowest in (RATES[0], RATES[-1])
    assert not found.bracketed and not found.passes and found.drift is None


def test_a_neighbour_that_diverged_or_is_far_above_counts_as_the_rim_of_the_valley() -> None:
    means = {-8.0: 2.3, -7.0: 2.1, -6.0: 2.0}
    # By hand: through 2.1, 2.0 and 2.2, at -6 + (2.1 - 2.2) / (2 * (2.1 - 2 * 2.0 + 2.2)).
    assert vertex(means | {-5.0: math.inf}) == pytest.approx(-6 - 1 / 6)
    assert vertex(means | {-5.0: 7.0}) == pytest.approx(-6 - 1 / 6)
    assert vertex(means | {-5.0: 2.15}) == pytest.approx(-6 - 0.1)
    assert vertex({-8.0: math.inf, -7.0: math.inf}) is None
    assert vertex({-8.0: 2.0, -7.0: math.inf}) is None


def test_of_equal_points_the_smaller_learning_rate_is_the_lowest() -> None:
    assert optimum_of(Valley(8, {-3.0: (2.0,), -4.0: (2.0,), -5.0: (3.0,)}, {})).lowest == -4.0


def test_one_seed_that_diverges_makes_its_point_infinite() -> None:
    losses = {-7.0: (2.1, 2.1), -6.0: (2.0, 2.0), -5.0: (1.0, math.inf)}
    found = optimum_of(Valley(8, losses, {}))
    assert found.lowest == -6.0 and found.loss == 2.0


def test_drift_is_the_slope_of_the_optimum_in_octaves_per_doubling() -> None:
    family = [valley(w, bowl(-5 - 0.89 * n)) for n, w in enumerate((32, 64, 128, 256))]
    found = judge(family)
    assert found.drift == pytest.approx(-0.89, abs=1e-9)
    assert not found.drift_passes and found.is_control and not found.passes
    assert slope((32, 128), (-5.0, -7.0)) == pytest.approx(-1.0)


@pytest.mark.parametrize(("moved", "passes"), [(0.14, True), (0.16, False), (-0.14, True)])
def test_drift_passes_up_to_its_limit_either_way(moved: float, passes: bool) -> None:
    assert abs(moved) < DRIFT_LIMIT or not passes
    found = judge([valley(w, bowl(-6 + moved * n)) for n, w in enumerate((32, 64, 128))])
    assert found.drift == pytest.approx(moved, abs=1e-9)
    assert found.drift_passes is passes and found.passes is passes


def test_widths_in_any_order_give_one_verdict() -> None:
    family = [valley(w, bowl(-5 - 0.1 * n, 2 - 0.1 * n)) for n, w in enumerate((32, 64, 128))]
    assert judge(family) == judge(family[::-1])


def test_regret_is_what_the_narrowest_model_s_rate_costs_a_wider_one() -> None:
    found = judge([valley(32, bowl(-5.0)), valley(64, bowl(-7.0, floor=1.9))])
    (regret,) = found.regrets
    assert (regret.width, regret.log2_lr) == (64, -5.0)
    assert regret.loss == pytest.approx(1.9 + 0.02 * 4) and regret.best == pytest.approx(1.9)
    assert regret.relative == pytest.approx(0.08 / 1.9)
    assert regret.allowed == REGRET_LIMIT and not regret.passes and not found.regret_passes


def test_regret_within_two_deviations_of_the_seeds_is_allowed() -> None:
    shifts = (-0.05, 0.0, 0.05)
    found = judge([valley(32, bowl(-5.0), shifts), valley(64, bowl(-7.0, floor=1.9), shifts)])
    (regret,) = found.regrets
    assert regret.allowed == pytest.approx(2 * 0.05 / 1.9) and regret.passes


def test_a_transferred_rate_that_diverges_costs_infinitely_much() -> None:
    wide = valley(64, bowl(-7.0))
    losses = {**wide.losses, -5.0: (math.inf,), -4.0: (math.inf,)}
    found = judge([valley(32, bowl(-5.0)), Valley(64, losses, {})])
    assert found.regrets[0].relative == math.inf and not found.regret_passes
    assert found.wider_is_better is False


def test_a_transferred_rate_beside_the_optimum_that_diverges_costs_infinitely_much() -> None:
    losses = {-6.0: (2.1,), -5.0: (2.0,), -4.0: (math.inf,)}
    found = judge([valley(32, bowl(-4.4)), Valley(64, losses, {})])
    assert found.regrets[0].relative == math.inf and not found.regret_passes
    nearer = judge([valley(32, bowl(-4.9)), Valley(64, losses, {})])
    assert math.isfinite(nearer.regrets[0].relative)


def test_wider_is_better_only_if_every_width_is() -> None:
    def family(*floors: float) -> bool | None:
        widths = (32, 64, 128)
        return judge(
            [valley(w, bowl(-6, f)) for w, f in zip(widths, floors, strict=True)]
        ).wider_is_better

    assert family(2.0, 1.9, 1.8) is True
    assert family(2.0, 2.1, 1.8) is False
    assert judge([valley(32, bowl(-6))]).wider_is_better is None


def test_the_interval_over_seeds_holds_the_optima_of_single_seeds() -> None:
    centres = (-6.3, -6.0, -5.6)
    losses = {rate: tuple(bowl(centre)(rate) for centre in centres) for rate in RATES}
    found = optimum_of(Valley(32, losses, {}))
    assert found.log2_lr == pytest.approx(np.mean(centres))
    assert found.low is not None and found.high is not None
    assert -6.3 - 1e-9 <= found.low < -6.1 < -5.8 < found.high <= -5.6 + 1e-9


def test_seeds_that_agree_leave_no_interval_and_one_seed_has_none() -> None:
    found = judge([valley(w, bowl(-6.2), (0.0, 0.1, 0.3)) for w in (32, 64)])
    assert found.drift_low == pytest.approx(0, abs=1e-9)
    assert found.drift_high == pytest.approx(0, abs=1e-9)
    alone = judge([valley(w, bowl(-6.2)) for w in (32, 64)])
    assert alone.drift_low is None and alone.optima[0].low is None and alone.passes


def test_intervals_are_the_same_each_time_and_leave_out_what_is_not_finite() -> None:
    losses = {rate: tuple(bowl(c)(rate) for c in (-6.4, -6.0, -5.5)) for rate in RATES}
    family = [Valley(w, losses, {}) for w in (32, 64, 128)]
    assert judge(family) == judge(family)
    assert judge(family, seed=1).drift_low != judge(family, seed=0).drift_low
    assert interval([math.nan, 1.0, 1.0]) == (1.0, 1.0)


def test_the_clip_fraction_is_that_of_the_best_point() -> None:
    flat = valley(32, bowl(-6.0))
    found = optimum_of(Valley(32, flat.losses, {-6.0: 0.25, -5.0: 0.5}))
    assert found.clip_fraction == 0.25


def test_all_diverged_is_no_optimum_and_no_verdict() -> None:
    lost = Valley(64, dict.fromkeys(RATES, (math.inf, math.inf)), {})
    found = judge([valley(32, bowl(-6.0), (0.0, 0.1)), lost])
    assert found.optima[1].lowest is None and found.optima[1].loss == math.inf
    assert not found.bracketed and not found.passes and found.regrets == ()


def test_what_is_handed_on_is_the_vertex_and_costs_what_the_parabola_says() -> None:
    means = {float(rate): 2.0 + 0.1 * (rate + 6.3) ** 2 for rate in range(-9, -3)}
    assert transferred_rate(means) == pytest.approx(-6.3, abs=1e-9)
    assert loss_above(means, -6.3) == pytest.approx(0.0, abs=1e-12)
    assert loss_above(means, -5.5) == pytest.approx(0.1 * 0.8**2, rel=1e-9)
    # Beyond the neighbours of the lowest point: straight lines between what was measured.
    between = (means[-4.0] + means[-5.0]) / 2 - means[-6.0]
    assert loss_above(means, -4.5) == pytest.approx(between, rel=1e-12)
    assert loss_above(means, -3.0) is None
    assert transferred_rate({-3.0: 2.0, -2.0: 2.5, -1.0: 3.0}) == -3.0
    assert transferred_rate({-3.0: math.inf}) is None
