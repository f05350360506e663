"""Rules and clips by hand, against torch, at the edges of what numbers there are, and around rules
without kernels.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slab_cases import CASES, FORMS, RULES, a_step, copy_of, make_slab, same_bits

from interlace.kernels.update import (
    SGD,
    AdamW,
    CoordinateClip,
    Signum,
    Slab,
    Step,
    UpdateRule,
    clipped_sgd,
    merge_master,
    update,
    update_many,
)

INFINITE = float("inf")
START = (1.0, 2.0, -1.0, 0.5)
FIRST, SECOND = (4.0, -0.5, 0.25, 0.0), (-2.0, 1.0, 0.25, 0.0)
"""Gradients of two updates."""

ADAMW = AdamW(lr=0.5, betas=(0.5, 0.75), eps=1.0, weight_decay=0.2)
SIGNUM = Signum(lr=0.5, momentum=0.5, weight_decay=0.2)
COUPLED = SGD(lr=0.5, momentum=0.5, weight_decay=0.2)
DECAY = {"weight_decay": 0.2}

BY_HAND: dict[str, tuple[UpdateRule, tuple[float, ...], tuple[float, ...], tuple[int, int]]] = {
    "sgd": (COUPLED, (-1.1, 2.05, -1.025, 0.45), (-1.04, 1.37, -1.06, 0.38), (0, 0)),
    "sgd, decoupled": (
        SGD(0.5, 0.5, 0.2, decoupled=True),
        (-1.1, 2.05, -1.025, 0.45),
        (-0.99, 1.47, -1.11, 0.405),
        (0, 0),
    ),
    "sgd, decoupled, nesterov": (
        SGD(0.5, 0.5, 0.2, nesterov=True, decoupled=True),
        (-2.1, 2.175, -1.0875, 0.45),
        (-0.89, 1.27, -1.1975, 0.405),
        (0, 0),
    ),
    "sgd, decoupled, no momentum": (
        SGD(0.5, 0.0, 0.2, decoupled=True),
        (-1.1, 2.05, -1.025, 0.45),
        (0.01, 1.345, -1.0475, 0.405),
        (0, 0),
    ),
    "signum": (SIGNUM, (0.4, 2.3, -1.4, 0.45), (0.36, 1.57, -1.76, 0.405), (0, 0)),
    "signum, no momentum": (
        Signum(0.5, 0.0, 0.2),
        (0.4, 2.3, -1.4, 0.45),
        (0.86, 1.57, -1.76, 0.405),
        (0, 0),
    ),
    "adamw": (
        ADAMW,
        (0.5, 1.9666667, -1.0, 0.45),
        (0.45, 1.6329202, -1.0, 0.405),
        (0, 0),
    ),
    "clipped sgd": (
        clipped_sgd(0.5, 1.0, 0.5, weight_decay=0.2),
        (0.4, 2.05, -1.025, 0.45),
        (0.61, 1.47, -1.11, 0.405),
        (1, 1),
    ),
    "clipped sgd, nesterov": (
        clipped_sgd(0.5, 1.0, 0.5, weight_decay=0.2, nesterov=True),
        (0.15, 2.175, -1.0875, 0.45),
        (0.76, 1.27, -1.1975, 0.405),
        (1, 1),
    ),
    "clipped sgd, no momentum": (
        clipped_sgd(0.5, 1.0, 0.0, weight_decay=0.2),
        (0.4, 2.05, -1.025, 0.45),
        (0.86, 1.345, -1.0475, 0.405),
        (1, 1),
    ),
    "clipped update of sgd": (
        clipped_sgd(0.5, 1.0, 0.5, weight_decay=0.2, stage="update"),
        (0.4, 2.05, -1.025, 0.45),
        (0.36, 1.47, -1.11, 0.405),
        (1, 0),
    ),
    "clipped update of sgd, nesterov": (
        clipped_sgd(0.5, 1.0, 0.5, weight_decay=0.2, nesterov=True, stage="update"),
        (0.4, 2.175, -1.0875, 0.45),
        (0.86, 1.4575, -1.1975, 0.405),
        (1, 2),
    ),
    "clipped gradient of sgd with coupled decay": (
        CoordinateClip(COUPLED, 1.0),
        (0.4, 2.05, -1.025, 0.45),
        (0.56, 1.37, -1.06, 0.38),
        (1, 1),
    ),
    "clipped gradient of signum": (
        CoordinateClip(SIGNUM, 1.0),
        (0.4, 2.3, -1.4, 0.45),
        (0.86, 1.57, -1.76, 0.405),
        (1, 1),
    ),
    "clipped update of signum": (
        CoordinateClip(SIGNUM, 0.5, "update"),
        (0.65, 2.05, -1.15, 0.45),
        (0.585, 1.595, -1.285, 0.405),
        (3, 2),
    ),
    "clipped first moment of adamw": (
        CoordinateClip(ADAMW, 1.0),
        (0.8, 1.9666667, -1.0, 0.45),
        (0.7614211, 1.6329202, -1.0, 0.405),
        (1, 1),
    ),
    "clipped update of adamw": (
        CoordinateClip(ADAMW, 0.25, "update"),
        (0.775, 1.925, -1.0, 0.45),
        (0.6975, 1.6075, -1.0, 0.405),
        (2, 1),
    ),
}
"""Rule, weights after either update, and coordinates cut in either. Momentum is 0.5, the decay
times the rate 0.1, the threshold of most 1.0.
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_two_updates_are_those_computed_by_hand(name: str, dtype: torch.dtype) -> None:
    rule, first, second, crossed = BY_HAND[name]
    weight = torch.tensor(START, dtype=dtype)
    moments = tuple(torch.zeros(4, dtype=dtype) for _ in rule.moments)
    for number, gradient, expected in ((1, FIRST, first), (2, SECOND, second)):
        slab = Slab(torch.tensor(gradient, dtype=dtype), weight, moments)
        assert update(rule, slab, Step(number, 1.0, rule.hyperparameters())) == crossed[number - 1]
        assert weight.tolist() == pytest.approx(expected, rel=2e-7, abs=2e-7)


def run(rule: UpdateRule, hyper: Mapping[str, Any], updates: int = 50) -> torch.Tensor:
    """Return 300 weights after updates with random gradients of many sizes."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, generator=generator)
    moments = tuple(torch.zeros(300) for _ in rule.moments)
    for number in range(1, updates + 1):
        gradient = torch.randn(300, generator=generator)
        update(rule, Slab(gradient, weight, moments), Step(number, 1.0, hyper))
    return weight


def run_torchs(optimizer: torch.optim.Optimizer, keep: float, updates: int = 50) -> torch.Tensor:
    """Return the same weights, shrunk by `keep` before every step of torch's optimizer."""
    generator = torch.Generator().manual_seed(1)
    (weight,) = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        weight.copy_(torch.randn(300, generator=generator))
        for _ in range(updates):
            weight.grad = torch.randn(300, generator=generator)
            weight.mul_(keep)
            optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("stage", ["gradient", "update"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_an_infinite_threshold_clipped_sgd_is_torchs_sgd(
    momentum: float, nesterov: bool, stage: Any
) -> None:
    if nesterov and not momentum:
        return
    rule = clipped_sgd(0.01, INFINITE, momentum, weight_decay=0.1, nesterov=nesterov, stage=stage)
    twin = torch.nn.Parameter(torch.zeros(300))
    theirs = torch.optim.SGD([twin], lr=0.01, momentum=momentum, nesterov=nesterov)
    expected = run_torchs(theirs, keep=1.0 - 0.01 * 0.1)
    torch.testing.assert_close(run(rule, rule.hyperparameters()), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("stage", ["gradient", "update"])
def test_with_an_infinite_threshold_clipped_adam_is_torchs_adamw(stage: Any) -> None:
    rule = CoordinateClip(AdamW(lr=0.01, weight_decay=0.1), INFINITE, stage)
    twin = torch.nn.Parameter(torch.zeros(300))
    expected = run_torchs(torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1), keep=1.0)
    torch.testing.assert_close(run(rule, rule.hyperparameters()), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", ["fp32 in place", "all 16 bits"])
@pytest.mark.parametrize("stage", ["gradient", "update"])
@pytest.mark.parametrize("name", ["adamw", "nesterov", "sgd without momentum", "signum"])
def test_an_infinite_threshold_changes_no_bit(name: str, stage: Any, form: str) -> None:
    rule = RULES[name]
    clip = CoordinateClip(rule, INFINITE, stage)
    bare = make_slab(form, rule, 1000)
    clipped = copy_of(bare)
    assert update(rule, bare, a_step(rule)) == 0
    assert update(clip, clipped, a_step(clip)) == 0
    assert same_bits(bare, clipped)


CLIPPED = {name: case for name, case in CASES.items() if isinstance(case[0], CoordinateClip)}
CLIPS = {name: rule for name, rule in RULES.items() if isinstance(rule, CoordinateClip)}
EACH_CLIP = pytest.mark.parametrize("rule", CLIPS.values(), ids=CLIPS)


@pytest.mark.parametrize(("rule", "form"), CLIPPED.values(), ids=CLIPPED)
def test_the_count_is_that_of_the_formula_in_fp64(rule: CoordinateClip, form: str) -> None:
    slab, step = make_slab(form, rule, 5000), a_step(rule)
    slab.gradient[17:20] = torch.tensor([torch.nan, -torch.inf, torch.inf])
    master = slab.master if slab.remainder is None else merge_master(slab.master, slab.remainder)
    moments = tuple(moment.double() for moment in slab.moments)
    gradient = slab.gradient.double() * step.gradient_scale
    expected = rule.plain_counted(master.double(), gradient, moments, step.number, step.hyper)
    pieces = [copy_of(slab), copy_of(slab)]
    assert expected > 1000
    assert update(rule, copy_of(slab), step) == expected
    parts = [update(rule, pieces[0], step, start=a, stop=b) for a, b in ((0, 999), (999, 5000))]
    assert sum(parts) == expected
    assert update_many(rule, pieces, [step, step])[1] == expected


@pytest.mark.parametrize("threshold", [0.5, INFINITE])
@pytest.mark.parametrize("form", ["fp32 in place", "all 16 bits"])
@EACH_CLIP
def test_a_coordinate_that_is_not_finite_counts_as_zero(
    rule: CoordinateClip, form: str, threshold: float
) -> None:
    clip = CoordinateClip(rule.rule, threshold, rule.stage)
    slab = make_slab(form, clip, 300)
    slab.gradient[:] = 0.25
    for moment in slab.moments:
        moment.zero_()
    with_zeros = copy_of(slab)
    slab.gradient[::3] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38]).repeat(25)
    with_zeros.gradient[::3] = 0.0
    # What the scale makes infinite is no better.
    step = Step(2, 2.0, clip.hyperparameters(), 7)
    crossed = update(clip, with_zeros, step)
    assert update(clip, slab, step) == crossed + 100
    assert same_bits(slab, with_zeros)


@given(
    threshold=st.floats(1e-30, 1e30),
    gradient=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
    number=st.integers(1, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_weight_moves_farther_than_rate_times_threshold(
    threshold: float, gradient: list[float], number: int
) -> None:
    for rule in (clipped_sgd(0.5, threshold, 0.0), clipped_sgd(0.5, threshold, stage="update")):
        weight = torch.zeros(len(gradient))
        moments = tuple(torch.zeros(len(gradient)) for _ in rule.moments)
        slab = Slab(torch.tensor(gradient), weight, moments)
        update(rule, slab, Step(number, 1.0, rule.hyperparameters()))
        assert bool((weight.abs() <= 0.5 * threshold * (1.0 + 1e-6)).all())


@EACH_CLIP
def test_with_a_threshold_of_zero_weights_only_decay(rule: CoordinateClip) -> None:
    slab = make_slab("fp32 in place", rule, 100)
    for moment in slab.moments:
        moment.zero_()
    before = slab.master.clone()
    hyper = rule.hyperparameters() | {"threshold": 0.0}
    assert update(rule, slab, Step(1, 1.0, hyper)) == 100
    keep = 1.0 - hyper["lr"] * hyper["weight_decay"]
    torch.testing.assert_close(slab.master, before * keep, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("elements", [1, 70])
def test_a_gradient_of_zeros_moves_nothing_and_equal_ones_move_all_alike(
    name: str, elements: int
) -> None:
    rule = RULES[name]
    hyper = rule.hyperparameters() | {"weight_decay": 0.0}
    for value in (0.0, 0.3, -2.0):
        weight = torch.ones(elements)
        moments = tuple(torch.zeros(elements) for _ in rule.moments)
        crossed = update(
            rule, Slab(torch.full((elements,), value), weight, moments), Step(1, 1.0, hyper)
        )
        assert crossed in (0, elements)
        assert len(set(weight.tolist())) == 1
        assert bool(((weight - 1.0).sign() == -torch.tensor(value).sign()).all())


def test_a_rule_is_scale_free_if_a_multiple_of_all_gradients_changes_nothing() -> None:
    rules = (AdamW(eps=0.0), Signum(), SGD(), CoordinateClip(SGD()), CoordinateClip(Signum()))
    for rule in rules:
        results: list[torch.Tensor] = []
        for scale in (1.0, 256.0):
            weight, moments = torch.zeros(50), tuple(torch.zeros(50) for _ in rule.moments)
            gradient = torch.randn(50, generator=torch.Generator().manual_seed(2)) * scale
            # A threshold has the unit of a gradient.
            hyper = rule.hyperparameters()
            hyper["threshold"] = hyper.get("threshold", 0.0) * scale
            update(rule, Slab(gradient, weight, moments), Step(1, 1.0, hyper))
            results.append(weight)
        assert torch.allclose(*results, rtol=1e-5) == rule.scale_free
    assert [rule.scale_free for rule in rules] == [True, True, False, False, True]


class OwnSGD(SGD):
    """A rule of somebody's own: it has a formula, and no kernels."""


class OwnAdamW(AdamW):
    """Likewise."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", ["gradient", "update"])
def test_around_a_rule_without_kernels_a_clip_does_the_same(stage: Any, form: str) -> None:
    values = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "decoupled": True}
    ours = CoordinateClip(SGD(**values), 0.5, stage)
    theirs = CoordinateClip(OwnSGD(**values), 0.5, stage)
    slab, step = make_slab(form, ours, 3000), a_step(ours)
    slab.gradient[5] = torch.nan
    kernel, formula, pieces = copy_of(slab), copy_of(slab), copy_of(slab)
    crossed = update(ours, kernel, step)
    assert update(theirs, formula, step) == crossed
    pairs = zip((kernel.master, *kernel.moments), (formula.master, *formula.moments), strict=True)
    for one, other in pairs:
        tolerance = 2e-6 if one.dtype is torch.float32 else 2**-7
        torch.testing.assert_close(one, other, rtol=tolerance, atol=2e-6)
    parts = [update(theirs, pieces, step, start=a, stop=b) for a, b in ((0, 7), (7, 3000))]
    assert sum(parts) == crossed
    assert same_bits(pieces, formula)


def test_around_a_rule_without_kernels_a_clipped_gradient_is_all_that_it_sees() -> None:
    clip = CoordinateClip(OwnAdamW(lr=0.1), 0.5)
    gradient = torch.tensor([3.0, -0.2, -4.0])
    moments = [tuple(torch.zeros(3) for _ in range(2)) for _ in range(2)]
    weights = [torch.ones(3), torch.ones(3)]
    assert update(clip, Slab(gradient, weights[0], moments[0]), a_step(clip)) == 2
    hand_cut = Slab(torch.tensor([0.5 / 0.7, -0.2, -0.5 / 0.7]), weights[1], moments[1])
    update(OwnAdamW(lr=0.1), hand_cut, a_step(OwnAdamW(lr=0.1)))
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(moments[0][1], moments[1][1])


def test_around_a_rule_without_kernels_the_rate_may_be_zero() -> None:
    clip = CoordinateClip(OwnSGD(lr=0.0, weight_decay=0.3), 0.5, "update")
    slab = make_slab("fp32 in place", clip, 10)
    before = slab.master.clone()
    update(clip, slab, a_step(clip))
    assert torch.equal(slab.master, before)


def test_a_clip_is_named_and_kept_as_the_rule_it_wraps() -> None:
    clip = CoordinateClip(AdamW(), 0.25)
    assert (clip.name, clip.moments) == ("adamw", ("exp_avg", "exp_avg_sq"))
    assert clip.hyperparameters() == AdamW().hyperparameters() | {"threshold": 0.25}
    assert clipped_sgd(momentum=0.0).moments == Signum(momentum=0.0).moments == ()
    assert clipped_sgd().moments == SGD().moments == ("momentum_buffer",)
    made = clipped_sgd(0.1, 0.2, 0.3, weight_decay=0.4, nesterov=True, stage="update", share=0.5)
    assert made == CoordinateClip(
        SGD(0.1, 0.3, 0.4, nesterov=True, decoupled=True), 0.2, "update", "fixed", 0.5
    )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"threshold": 0.0}, "threshold=0.0: must be more than 0; infinity clips nothing"),
    ({"threshold": -1.0}, "threshold=-1.0: must be more than 0"),
    ({"threshold": float("nan")}, "threshold=nan: must be more than 0"),
    ({"share": 0.0}, "share=0.0: must be between 0 and 1"),
    ({"share": 1.0}, "share=1.0: must be between 0 and 1"),
    ({"stage": "weight"}, "stage='weight': must be 'gradient' or 'update'"),
    ({"policy": "best"}, "policy='best': must be 'fixed' or 'lagged_quantile'"),
    ({"rule": CoordinateClip(SGD())}, "rule is a CoordinateClip already: clip one stage, once"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_a_clip_with_a_wrong_value_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {"rule": SGD()}
    with pytest.raises(ValueError) as caught:
        CoordinateClip(**(values | change))
    assert words in str(caught.value)


def test_a_parameter_group_with_a_wrong_value_is_refused_in_words() -> None:
    for rule in (clipped_sgd(), CoordinateClip(OwnSGD())):
        slab = make_slab("fp32 in place", rule, 4)
        for wrong in (-0.5, float("nan")):
            step = Step(1, 1.0, rule.hyperparameters() | {"threshold": wrong})
            with pytest.raises(ValueError, match=f"threshold={wrong} in a parameter group"):
                update(rule, slab, step)
    for rule in (SGD(momentum=0.0), Signum(momentum=0.0), clipped_sgd(momentum=0.0)):
        step = Step(1, 1.0, rule.hyperparameters() | {"momentum": 0.9})
        with pytest.raises(ValueError, match=r"momentum=0\.9 in a parameter group: .* no buffer"):
            update(rule, make_slab("fp32 in place", rule, 4), step)
    for name in ("lr", "momentum", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            Signum(**{name: -1.0})
