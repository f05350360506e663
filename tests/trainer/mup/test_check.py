"""The coordinate check: slopes and causes from made-up sizes, and real ones with rules left out."""

from collections import defaultdict
from collections.abc import Mapping

import pytest

from interlace.trainer.config.load import load_recipe
from interlace.trainer.config.mup_section import Rule
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.mup.check.measuring import Key, Series
from interlace.trainer.mup.check.running import Request, check
from interlace.trainer.mup.check.verdict import Verdict, judge
from interlace.trainer.mup.manifest import Entry, Manifest
from interlace.trainer.mup.scaling import Factors

WIDTHS, STEPS = (16, 32, 64, 128), 4


def entry(name: str, role: str) -> Entry:
    return Entry(name, "", (8, 8), role, 1.0, 1.0, Factors())  # pyright: ignore[reportArgumentType]


MANIFEST = Manifest((entry("first.weight", "hidden"), entry("head.weight", "readout")), {})


def made_up(exponents: Mapping[Key, tuple[float, float]]) -> dict[tuple[int, int], Series]:
    """Series whose sizes go as given powers of the width, at the start and later."""
    found: dict[tuple[int, int], Series] = {}
    for width in WIDTHS:
        for seed in (0, 1):
            series: Series = defaultdict(list)
            for key, (start, late) in exponents.items():
                values = [width**start, *[width**late] * (STEPS - 1)]
                series[key] = [3.0 * value for value in values]
            found[width, seed] = series
    return found


def test_slopes_are_the_exponents_of_the_width() -> None:
    exponents = {Key("first", "size"): (0.1, 0.2), Key("head", "size"): (-0.5, 0.0)}
    verdict = judge(made_up(exponents), MANIFEST, STEPS)
    found = {(each.title, each.phase): each.slope for each in verdict.slopes}
    assert found["first", "start"] == pytest.approx(0.1, abs=1e-9)
    assert found["first", "late"] == pytest.approx(0.2, abs=1e-9)
    assert found["head", "start"] == pytest.approx(-0.5, abs=1e-9)
    assert verdict.passes
    assert verdict.at_fault is None


def test_an_output_that_starts_as_large_at_every_width_fails() -> None:
    verdict = judge(made_up({Key("head", "size"): (0.0, 0.0)}), MANIFEST, STEPS)
    assert not verdict.passes
    assert verdict.at_fault == "head"


def test_an_output_that_starts_at_zero_passes() -> None:
    series = made_up({Key("head", "size"): (0.0, 0.0)})
    for each in series.values():
        each[Key("head", "size")][0] = 0.0
    assert judge(series, MANIFEST, STEPS).passes


def test_the_first_cause_is_named_and_not_what_follows_from_it() -> None:
    exponents = {
        Key("first", "size"): (0.0, 0.9),
        Key("first", "change"): (0.0, 0.9),
        Key("head", "size"): (0.5, 0.9),
        Key("first.weight", "gradient"): (1.0, 1.0),
        Key("head.weight", "gradient"): (1.0, 1.0),
        Key("first.weight", "update"): (1.0, 1.0),
    }
    verdict = judge(made_up(exponents), MANIFEST, STEPS)
    assert verdict.at_fault == "head"
    order = [(each.title, each.statistic, each.phase) for each in verdict.failures[:4]]
    assert order == [
        ("head", "size", "start"),
        ("head.weight", "gradient", "start"),
        ("first.weight", "gradient", "start"),
        ("first.weight", "update", "start"),
    ]


def test_a_trial_that_ends_early_fails_the_check() -> None:
    series = made_up({Key("first", "size"): (0.0, 0.0)})
    series[128, 1][Key("first", "size")] = series[128, 1][Key("first", "size")][:2]
    verdict = judge(series, MANIFEST, STEPS)
    assert verdict.ended_early == (128,)
    assert not verdict.passes


def test_trials_whose_first_step_is_not_finite_fail_the_check() -> None:
    nothing: dict[tuple[int, int], Series] = {(width, 0): defaultdict(list) for width in WIDTHS}
    verdict = judge(nothing, MANIFEST, STEPS)
    assert verdict.ended_early == WIDTHS
    assert not verdict.passes and verdict.at_fault is None


def test_shares_of_clipped_coordinates_that_nobody_sees_say_nothing() -> None:
    series = made_up({Key("first.weight", "clipped"): (-1.0, -1.0)})
    assert not judge(series, MANIFEST, STEPS).passes
    for each in series.values():
        key = Key("first.weight", "clipped")
        each[key] = [value * 1e-3 for value in each[key]]
    assert judge(series, MANIFEST, STEPS).passes


SMALL = (
    "model.layers=1",
    "model.width=64",
    "model.heads=8",
    "model.kv_heads=8",
    "model.ffn_width=128",
    "data.sequence_length=32",
    "data.respect_documents=false",
)

EXTRA: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "quickstart_hybrid": ("model.pattern=MF", "model.mamba_head_width=4"),
    "quickstart_moe": ("model.moe_expert_width=64",),
    "quickstart_ebt": (),
}

LR = {"adamw": 0.01, "clipped_sgd": 1.0}


def recipe(name: str, rule: str) -> RunConfig:
    return load_recipe(name, [*SMALL, *EXTRA[name], f"optimizer.rule={rule}"]).config


def checked(name: str, rule: str, without: tuple[Rule, ...] = (), **more: bool) -> Verdict:
    request = Request(
        widths=WIDTHS,
        seeds=2,
        steps=6,
        tokens=256,
        lr=LR[rule] * (0.3 if name == "quickstart_ebt" else 1.0),
        base_width=WIDTHS[0],
        without=without,
        standard=more.get("standard", False),
    )
    return check(recipe(name, rule), request, lambda done, total: None).verdict


@pytest.mark.parametrize("rule", LR)
def test_a_transformer_passes_under_mup_and_fails_without(rule: str) -> None:
    assert checked("quickstart", rule).failures == ()
    assert checked("quickstart", rule, standard=True).at_fault == "head"


REMOVED: list[tuple[str, str, Rule, str]] = [
    ("quickstart", "adamw", "hidden_lr", "layers.0.blocks.0.mixer.query.weight"),
    ("quickstart", "adamw", "readout_multiplier", "head"),
    ("quickstart", "clipped_sgd", "hidden_lr", "layers.0.blocks.0.mixer.query.weight"),
    # Every tensor has one; the first is named.
    ("quickstart", "clipped_sgd", "threshold", "embedding.weight"),
    ("quickstart_hybrid", "adamw", "row_blocks", "layers.0.blocks.0.mixer.in_proj[B]"),
    ("quickstart_moe", "adamw", "router", "layers.0.blocks.1.mixer.router"),
]


@pytest.mark.parametrize(("name", "rule", "without", "module"), REMOVED)
def test_without_a_rule_the_module_at_fault_is_named(
    name: str, rule: str, without: Rule, module: str
) -> None:
    assert checked(name, rule, (without,)).at_fault == module


def request_of(lr: float) -> Request:
    return Request(widths=WIDTHS, seeds=1, steps=4, tokens=64, lr=lr, base_width=WIDTHS[0])


@pytest.mark.parametrize("rule", LR)
def test_a_step_that_is_not_finite_fails_the_check_also_where_gradients_are_guarded(
    rule: str,
) -> None:
    found = check(recipe("quickstart", rule), request_of(1e30), lambda done, total: None)
    assert found.verdict.ended_early == WIDTHS
    assert not found.verdict.passes


@pytest.mark.parametrize("stage", ["gradient", "update"])
def test_shares_of_clipped_coordinates_are_of_gradients_where_these_are_clipped(
    stage: str,
) -> None:
    config = recipe("quickstart", "adamw")
    clip = config.coordinate_clip.model_copy(update={"stage": stage})
    asked = config.model_copy(update={"coordinate_clip": clip})
    found = check(asked, request_of(0.01), lambda done, total: None)
    seen = {slope.statistic for slope in found.verdict.slopes}
    assert ("clipped" in seen) == (stage == "gradient")


@pytest.mark.long
@pytest.mark.parametrize("rule", LR)
@pytest.mark.parametrize("name", ["quickstart_hybrid", "quickstart_moe", "quickstart_ebt"])
def test_every_family_passes_under_mup_and_fails_without(name: str, rule: str) -> None:
    assert checked(name, rule).failures == ()
    assert not checked(name, rule, standard=True).passes
