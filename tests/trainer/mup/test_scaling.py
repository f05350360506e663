"""The rules of muP against the published tables, written out, and what follows from them."""

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlace.trainer.mup.scaling import Factors, Growth, Part, factors

M_IN, M_OUT, DEPTH = 3.0, 5.0, 7.0

ROLES: dict[str, dict[str, Any]] = {
    "input": {"part": "input", "fan_out": M_OUT},
    "hidden": {"part": "hidden", "fan_in": M_IN, "fan_out": M_OUT},
    "divided readout": {"part": "readout", "fan_in": M_IN, "divided": True},
    "readout": {"part": "readout", "fan_in": M_IN},
    "finite": {"part": "finite"},
}

# Yang et al. 2022, table 8 (and table 3 for a readout that nothing divides): factors on Adam's rate
# and on that of gradient descent.
PUBLISHED = {
    "input": (1.0, M_OUT),
    "hidden": (1 / M_IN, M_OUT / M_IN),
    "divided readout": (1.0, M_IN),
    "readout": (1 / M_IN, 1 / M_IN),
    "finite": (1.0, 1.0),
}


@pytest.mark.parametrize("name", list(ROLES))
def test_rates_are_those_of_the_published_table(name: str) -> None:
    growth = Growth(**ROLES[name])
    found = factors(growth, True).lr, factors(growth, False).lr
    assert found == pytest.approx(PUBLISHED[name], rel=1e-15)


@pytest.mark.parametrize("name", list(ROLES))
def test_epsilon_and_threshold_are_multiples_of_adam_s_rate_over_gradient_descent_s(
    name: str,
) -> None:
    adam, descent = PUBLISHED[name]
    for scale_free in (True, False):
        found = factors(Growth(**ROLES[name]), scale_free)
        assert found.threshold == found.eps == pytest.approx(adam / descent, rel=1e-15)


# Where a recipe's own start has a spread of 1 / sqrt(fan-in) or a constant one, and muP wants the
# spread of the table (form with divided outputs: constant; without: 1 / fan-in).
@pytest.mark.parametrize(
    ("name", "spread_falls", "wanted"),
    [
        ("input", True, 1.0),
        ("hidden", True, M_IN**-0.5),
        ("divided readout", True, 1.0),
        ("divided readout", False, 1.0),
        ("readout", True, 1 / M_IN),
        ("readout", False, 1 / M_IN),
        ("finite", True, 1.0),
    ],
)
def test_the_spread_at_the_start_is_that_of_the_published_table(
    name: str, spread_falls: bool, wanted: float
) -> None:
    growth = Growth(**ROLES[name], spread_falls=spread_falls)
    own = growth.fan_in**-0.5 if spread_falls else 1.0
    assert own * factors(growth, True).initial == pytest.approx(wanted, rel=1e-15)


# CompleteP, alpha = 1: Dey et al. 2025; gradient descent has another factor L of the depth.
@pytest.mark.parametrize("name", list(ROLES))
def test_depth_leaves_adam_s_rate_and_divides_the_gradient(name: str) -> None:
    flat, deep = Growth(**ROLES[name]), Growth(**ROLES[name], depth=DEPTH)
    for scale_free in (True, False):
        one, other = factors(flat, scale_free), factors(deep, scale_free)
        assert other.lr / one.lr == pytest.approx(1.0 if scale_free else DEPTH, rel=1e-15)
        assert other.eps / one.eps == pytest.approx(1 / DEPTH, rel=1e-15)
        assert other.threshold / one.threshold == pytest.approx(1 / DEPTH, rel=1e-15)
        assert other.initial == one.initial


growths = st.builds(
    Growth,
    part=st.sampled_from(get_args(Part)),
    fan_in=st.floats(0.125, 64.0),
    fan_out=st.floats(0.125, 64.0),
    depth=st.floats(0.25, 16.0),
    divided=st.booleans(),
    spread_falls=st.booleans(),
)


@given(growths, st.booleans())
def test_what_a_step_decays_does_not_depend_on_the_width(growth: Growth, scale_free: bool) -> None:
    found = factors(growth, scale_free)
    assert found.lr * found.weight_decay == pytest.approx(1.0, rel=1e-12)


@given(growths)
def test_a_clipped_step_is_one_function_of_the_gradient_over_its_scale(growth: Growth) -> None:
    """Gradient descent at rate r / s clipped at c s is, on s times a gradient, what the rule of
    Adam's rate r clipped at c is on the gradient itself.
    """
    adam, descent = factors(growth, True), factors(growth, False)
    for coordinate in (-3.0, -0.2, 0.0, 0.01, 0.9, 40.0):
        seen = coordinate * descent.threshold
        clipped = max(-descent.threshold, min(descent.threshold, seen))
        step = descent.lr * clipped
        assert step == pytest.approx(adam.lr * max(-1.0, min(1.0, coordinate)), rel=1e-12)


def test_without_growth_every_factor_is_one() -> None:
    for part in get_args(Part):
        for divided in (False, True):
            for scale_free in (False, True):
                assert factors(Growth(part=part, divided=divided), scale_free) == Factors()


@pytest.mark.parametrize(
    ("rule", "scale_free", "name", "changed"),
    [
        ("hidden_lr", True, "hidden", {"lr": 1.0, "weight_decay": 1.0}),
        ("hidden_lr", False, "hidden", {"lr": M_OUT, "weight_decay": 1 / M_OUT}),
        ("vector_lr", False, "input", {"lr": 1.0, "weight_decay": 1.0}),
        ("vector_lr", False, "divided readout", {"lr": 1.0, "weight_decay": 1.0}),
        ("threshold", False, "hidden", {"threshold": 1.0}),
        ("epsilon", True, "hidden", {"eps": 1.0}),
        ("weight_decay", True, "hidden", {"weight_decay": 1.0}),
    ],
)
def test_leaving_out_a_rule_changes_what_it_is_for_and_nothing_else(
    rule: Any, scale_free: bool, name: str, changed: dict[str, float]
) -> None:
    growth = Growth(**ROLES[name])
    whole, found = factors(growth, scale_free), factors(growth, scale_free, [rule])
    expected = Factors(
        **{key: changed.get(key, getattr(whole, key)) for key in Factors.__dataclass_fields__}
    )
    assert vars_of(found) == pytest.approx(vars_of(expected), rel=1e-15)
    assert vars_of(found) != vars_of(whole)


def vars_of(found: Factors) -> dict[str, float]:
    """Return the factors by name."""
    return {key: getattr(found, key) for key in Factors.__dataclass_fields__}


def test_factors_of_a_narrower_model_are_those_of_the_wider_one_turned_over() -> None:
    wide = factors(Growth(part="hidden", fan_in=4.0, fan_out=2.0), False)
    narrow = factors(Growth(part="hidden", fan_in=1 / 4, fan_out=1 / 2), False)
    for name in Factors.__dataclass_fields__:
        assert math.isclose(getattr(wide, name) * getattr(narrow, name), 1.0, rel_tol=1e-15)
