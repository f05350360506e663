"""Roles and factors of every family's tensors, written out; and what a manifest's digest is of."""

import json
import re
from typing import Any

import pytest
import torch
from mup_cases import BASE, FAMILIES, VOCABULARY, WIDTH, recipe

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.mup import manifest as module
from interlace.trainer.mup.manifest import UNSCALED, Entry, Manifest, differences, manifest_of
from interlace.trainer.mup.scaling import Factors
from interlace.trainer.objectives import objective_of

M = WIDTH / BASE
INPUT, HIDDEN, OUTPUT, NARROW, FINITE = (
    ("input", 1.0, M),
    ("hidden", M, M),
    ("readout", M, 1.0),
    ("readout", M, 1.0, "undivided"),
    ("finite", 1.0, 1.0),
)
ATTENTION = {r"mixer\.(query|key|value|output)\.weight": HIDDEN}
FORWARD = {r"mixer\.(gate|up|down)\.weight": HIDDEN}
OUTSIDE = {r"embedding\.weight": INPUT, r"norm\.weight": INPUT, r"head\.weight": OUTPUT}
ENERGY = {
    r"candidate_proj\.weight": INPUT,
    r"energy_head\.weight": OUTPUT,
    r"step_embed\.weight": INPUT,
    r"step_size": FINITE,
}

EXPECTED: dict[str, dict[str, Any]] = {
    "transformer": {**OUTSIDE, **ATTENTION, **FORWARD},
    "one key head": {
        **OUTSIDE,
        **FORWARD,
        r"mixer\.(query|output)\.weight": HIDDEN,
        r"mixer\.(key|value)\.weight": NARROW,
    },
    "tied": {r"(embedding|norm)\.weight": INPUT, **ATTENTION, **FORWARD},
    "wide heads": {**OUTSIDE, **ATTENTION, **FORWARD},
    "normed wide heads": {
        **OUTSIDE,
        **ATTENTION,
        **FORWARD,
        r"mixer\.(query|key)_norm\.weight": INPUT,
    },
    "hybrid": {
        **OUTSIDE,
        **ATTENTION,
        **FORWARD,
        r"mixer\.in_proj\.weight\[(z|x|dt)\]": HIDDEN,
        r"mixer\.in_proj\.weight\[(B|C)\]": NARROW,
        r"mixer\.conv\.(weight|bias)\[x\]": INPUT,
        r"mixer\.conv\.(weight|bias)\[(B|C)\]": FINITE,
        r"mixer\.dynamics\.(A_log|dt_bias|D)": INPUT,
        r"mixer\.norm\.weight": INPUT,
        r"mixer\.out_proj\.weight": HIDDEN,
    },
    "experts": {
        **OUTSIDE,
        **ATTENTION,
        r"mixer\.router\.weight": OUTPUT,
        r"mixer\.experts\.(gate|up|down)": HIDDEN,
        r"mixer\.shared\.(gate|up|down)\.weight": HIDDEN,
    },
    "energy": {**OUTSIDE, **ATTENTION, **FORWARD, **ENERGY},
    "energy, adaln": {
        **OUTSIDE,
        **ATTENTION,
        **FORWARD,
        **ENERGY,
        r"modulations\.\d\.weight": HIDDEN,
    },
}
"""Role, growth of fan-in and of fan-out, by name inside its block or in the model."""

MULTIPLIERS: dict[str, dict[str, float]] = {
    "wide heads": {"layers.*.blocks.0.mixer.score_scale": 8**-0.5 / M},
    "normed wide heads": {"layers.*.blocks.0.mixer.score_scale": 8**-0.5 / M},
    "experts": {"layers.*.blocks.1.mixer.router.multiplier": 1 / M},
}
"""Beside the readout's."""


def expected_of(family: str, entry: Entry) -> tuple[Any, ...]:
    """Return role, growths and whether nothing divides the readout, of the one pattern that fits an
    entry.
    """
    inside = re.sub(r"^layers\.\d+\.blocks\.\d+\.", "", entry.title)
    [found] = [want for like, want in EXPECTED[family].items() if re.fullmatch(like, inside)]
    return found


def rates_of(want: tuple[Any, ...]) -> tuple[float, float]:
    """Return the published factors on Adam's rate and on that of gradient descent."""
    role, fan_in, fan_out, *undivided = want
    if role == "hidden":
        return 1 / fan_in, fan_out / fan_in
    if role == "readout":
        return (1 / fan_in, 1 / fan_in) if undivided else (1.0, fan_in)
    return 1.0, fan_out


def manifest(family: str = "transformer", **tables: dict[str, Any]) -> Manifest:
    return manifest_of(recipe(family, **tables), VOCABULARY)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_tensor_has_its_role_its_growth_and_its_rates(family: str) -> None:
    adam, descent = manifest(family), manifest(family, optimizer={"rule": "clipped_sgd"})
    with_factors = zip(adam.entries, descent.entries, strict=True)
    seen: set[tuple[Any, ...]] = set()
    for entry, other in with_factors:
        want = expected_of(family, entry)
        seen.add(want)
        assert (entry.role, entry.fan_in, entry.fan_out) == want[:3], entry.title
        rates = rates_of(want)
        assert (entry.factors.lr, other.factors.lr) == pytest.approx(rates), entry.title
        scale = rates[0] / rates[1]
        for found in (entry.factors, other.factors):
            assert found.eps == found.threshold == pytest.approx(scale), entry.title
            assert found.lr * found.weight_decay == pytest.approx(1.0)
            assert found.initial == pytest.approx(initial_of(family, entry, want)), entry.title
    assert seen == {*EXPECTED[family].values()}


def initial_of(family: str, entry: Entry, want: tuple[Any, ...]) -> float:
    """Return the factor on the start: that of a recipe alone falls with the root of the fan-in,
    but for head and router, whose spread is constant.
    """
    if want == NARROW:
        return M**-0.5
    if entry.name == "energy_head.weight":
        return M**0.5
    return 1.0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_readouts_routers_and_scores_are_what_is_divided(family: str) -> None:
    found = {
        re.sub(r"layers\.\d+", "layers.*", path): value
        for path, value in manifest(family).multipliers.items()
    }
    assert found == pytest.approx({"norm.multiplier": 1 / M, **MULTIPLIERS.get(family, {})})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_entries_are_those_of_the_model_and_add_up_to_its_tensors(family: str) -> None:
    config = recipe(family)
    with torch.device("meta"):
        model = objective_of(config).build(config, VOCABULARY, torch.float32)
    found = manifest(family)
    for (name, entries), (expected, parameter) in zip(
        found.by_name.items(), model.named_parameters(), strict=True
    ):
        assert name == expected
        assert sum(each.shape[0] for each in entries) == parameter.shape[0]
        assert {each.shape[1:] for each in entries} == {tuple(parameter.shape[1:])}


@pytest.mark.parametrize("rule", ["adamw", "clipped_sgd"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_at_its_own_base_width_every_factor_is_one_and_every_multiplier_the_module_s_own(
    family: str, rule: str
) -> None:
    config = recipe(family, mup={"base_width": WIDTH}, optimizer={"rule": rule})
    found = manifest_of(config, VOCABULARY)
    assert {entry.factors for entry in found.entries} == {Factors()}
    assert {entry.role for entry in found.entries} == {e.role for e in manifest(family).entries}
    with torch.device("meta"):
        model = objective_of(config).build(config, VOCABULARY, torch.float32)
    for path, number in found.multipliers.items():
        owner, _, name = path.rpartition(".")
        assert getattr(model.get_submodule(owner), name) == number, path


def test_a_recipe_without_mup_has_an_empty_manifest() -> None:
    config = recipe(mup={"enabled": False})
    assert manifest_of(config, VOCABULARY) is UNSCALED
    assert UNSCALED.document == {}


# CompleteP: Dey et al. 2025, table 1; gradient descent by the scale of the gradient.
@pytest.mark.parametrize("family", ["transformer", "experts", "energy, adaln"])
def test_depth_divides_blocks_and_what_is_compared_with_their_gradients(family: str) -> None:
    shape = {"layers": 6}
    tables = {"model": shape, "mup": {"base_layers": 2}}
    deep, flat = manifest(family, **tables), manifest(family, model=shape)
    blocks = {path for path in deep.multipliers if path.startswith("layers.")}
    added = deep.multipliers.keys() - flat.multipliers.keys()
    assert added == {f"layers.{n}.blocks.{b}.multiplier" for n in range(6) for b in range(2)}
    assert {deep.multipliers[path] for path in added} == {1 / 3}
    assert blocks >= added
    for scale_free in (True, False):
        rule = {"optimizer": {"rule": "adamw" if scale_free else "clipped_sgd"}}
        deep, flat = manifest(family, **tables, **rule), manifest(family, model=shape, **rule)
        for one, other in zip(deep.entries, flat.entries, strict=True):
            inside = one.name.startswith(("layers.", "modulations."))
            scale = 1 / 3 if inside else 1.0
            ratio = {key: getattr(one.factors, key) / getattr(other.factors, key) for key in KEYS}
            assert ratio.pop("initial") == pytest.approx(3**0.5 if writes(one) else 1.0)
            lr = 1.0 if scale_free else 1 / scale
            expected = {"lr": lr, "weight_decay": 1 / lr, "eps": scale, "threshold": scale}
            assert ratio == pytest.approx(expected), one.title


KEYS = ("initial", "lr", "weight_decay", "eps", "threshold")


def writes(entry: Entry) -> bool:
    """Whether a matrix writes into the residual stream: alone it would start smaller in a deeper
    model, which the block's multiplier sees to under this rule.
    """
    return bool(re.search(r"mixer\.(output\.weight|(experts\.|shared\.)?down)", entry.name))


def test_output_matrices_start_alike_at_every_depth() -> None:
    values: list[float] = []
    for layers in (2, 8):
        config = recipe(model={"layers": layers}, mup={"base_layers": 2})
        with torch.device("meta"):
            model = objective_of(config).build(config, VOCABULARY, torch.float32)
        name = "layers.0.blocks.0.mixer.output.weight"
        start = model.initial_value(name, (WIDTH, WIDTH), 0)
        values.append(float(manifest_of(config, VOCABULARY).rescale(name, start).std()))
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_outputs_and_queries_start_at_zero_where_the_recipe_says_so() -> None:
    zero = {"mup": {"zero_readout": True, "zero_query": True}}
    for family, names in {
        "transformer": {"head.weight", "mixer.query.weight"},
        "experts": {"head.weight", "mixer.query.weight", "mixer.router.weight"},
        "energy": {"energy_head.weight", "mixer.query.weight"},
        "one key head": {"head.weight", "mixer.query.weight"},
    }.items():
        found = {
            re.sub(r"^layers\.\d+\.blocks\.\d+\.", "", entry.name)
            for entry in manifest(family, **zero).entries
            if entry.factors.initial == 0.0
        }
        assert found == names, family


def test_the_document_is_json_and_its_digest_the_same_every_time() -> None:
    for family in FAMILIES:
        one, other = manifest(family), manifest(family)
        assert one.digest == other.digest and re.fullmatch("[0-9a-f]{64}", one.digest)
        again = json.loads(json.dumps(one.document))
        assert differences(again, other.document) == []


def test_what_does_not_scale_anything_leaves_the_digest() -> None:
    same = manifest(run={"seed": 5}, optimizer={"peak_lr": 0.1}, train={"steps": 7})
    assert same.digest == manifest().digest


SETTINGS: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "base width": ("transformer", {"mup": {"base_width": 64}}, "norm.multiplier: 0.25, now 0.5"),
    "base depth": (
        "transformer",
        {"mup": {"base_layers": 1}},
        "layers.0.blocks.0.multiplier: nothing, now 0.5",
    ),
    "what grows": (
        "wide heads",
        {"mup": {"grows": "heads"}, "model": {"heads": 16}},
        "layers.0.blocks.0.mixer.score_scale: 0.08838834764831843, now nothing",
    ),
    "zero readout": (
        "transformer",
        {"mup": {"zero_readout": True}},
        "head.weight: initial=1.0, now initial=0.0",
    ),
    "zero query": (
        "transformer",
        {"mup": {"zero_query": True}},
        "layers.0.blocks.0.mixer.query.weight: initial=1.0, now initial=0.0",
    ),
    "update rule": (
        "transformer",
        {"optimizer": {"rule": "sgd"}},
        "embedding.weight: lr=1.0 weight_decay=1.0, now lr=4.0 weight_decay=0.25",
    ),
    "tied": (
        "transformer",
        {"model": {"tie_embeddings": True}},
        "head.weight: something, now nothing",
    ),
    "width": ("transformer", {"model": {"width": 64, "heads": 8, "kv_heads": 4}}, "norm.mult"),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_setting_that_scales_changes_the_digest_and_is_named(name: str) -> None:
    family, tables, said = SETTINGS[name]
    before, now = manifest(family), manifest(family, **tables)
    assert before.digest != now.digest
    assert differences(before.document, now.document)[0].startswith(said)


WITHOUT: dict[str, tuple[str, str, str, set[str]]] = {
    # Rule: family and update rule in which it acts, and tensors (or modules) that it changes there.
    "hidden_lr": ("transformer", "adamw", "lr weight_decay", {"hidden"}),
    "vector_lr": ("transformer", "sgd", "lr weight_decay", {"input", "readout"}),
    "readout_multiplier": ("transformer", "adamw", "", {"norm.multiplier"}),
    "router": ("experts", "adamw", "", {"mixer.router.multiplier"}),
    "threshold": ("transformer", "clipped_sgd", "threshold", {"hidden", "input", "readout"}),
    "weight_decay": ("transformer", "adamw", "weight_decay", {"hidden"}),
    "epsilon": ("transformer", "adamw", "eps", {"hidden", "input", "readout"}),
    "attention_scale": ("wide heads", "adamw", "", {"mixer.score_scale"}),
}


@pytest.mark.parametrize("rule", list(WITHOUT))
def test_leaving_out_a_rule_takes_away_what_it_is_for_and_nothing_else(rule: str) -> None:
    family, update, changed, where = WITHOUT[rule]
    quantile = {"policy": "lagged_quantile"} if rule == "threshold" else {}
    tables = {"optimizer": {"rule": update}, "coordinate_clip": quantile}
    whole = manifest(family, **tables)
    found = manifest(family, **tables, mup={"without": [rule]})
    gone = whole.multipliers.keys() - found.multipliers.keys()
    names = {re.sub(r"^layers\.\d+\.blocks\.\d+\.", "", path) for path in gone}
    assert names == (where if not changed else set())
    roles: set[str] = set()
    for one, other in zip(whole.entries, found.entries, strict=True):
        keys = {key for key in KEYS if getattr(one.factors, key) != getattr(other.factors, key)}
        if keys:
            roles.add(one.role)
            assert keys == set(changed.split())
    assert roles == (where if changed else set())


@pytest.mark.parametrize(
    ("rule", "stage", "scale"),
    [
        ("adamw", "gradient", 1 / M),
        ("adamw", "update", 1.0),
        ("signum", "gradient", 1 / M),
        ("signum", "update", 1.0),
        ("clipped_sgd", "gradient", 1 / M),
        ("clipped_sgd", "update", 1 / M),
    ],
)
def test_a_threshold_follows_what_it_cuts(rule: str, stage: str, scale: float) -> None:
    """The direction of Adam and Signum has one scale at all widths, gradients and sums of them
    shrink.
    """
    found = manifest(optimizer={"rule": rule}, coordinate_clip={"stage": stage})
    assert {entry.factors.threshold for entry in found.entries} == {scale}
    assert {entry.factors.eps for entry in found.entries} == {1 / M}


def test_without_blocks_of_rows_fused_tensors_are_one_matrix() -> None:
    found = manifest("hybrid", mup={"without": ["row_blocks"]})
    assert not any(entry.rows for entry in found.entries)
    [fused] = found.by_name["layers.0.blocks.0.mixer.in_proj.weight"]
    assert (fused.role, fused.fan_in, fused.fan_out) == ("hidden", M, 560 / 152)


def test_a_rule_that_does_not_say_whether_it_is_scale_free_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent:
        name = "silent"

    def silent(config: RunConfig) -> Silent:
        return Silent()

    monkeypatch.setattr(module, "rule_of", silent)
    with pytest.raises(ConfigError) as caught:
        manifest()
    assert str(caught.value) == (
        "optimizer.rule=adamw: does not say whether its update depends on the gradient's scale, "
        "which decides how muP's learning rates follow the width; give the rule "
        "`scale_free = True` (as Adam's) or False (as that of gradient descent)"
    )


@pytest.mark.parametrize(
    ("family", "few", "many"),
    [
        ("transformer", {"heads": 2, "kv_heads": 2}, {"heads": 16, "kv_heads": 16}),
        ("hybrid", {"mamba_head_width": 128}, {"mamba_head_width": 8}),
    ],
)
def test_how_many_heads_share_a_width_does_not_change_its_growth(
    family: str, few: dict[str, int], many: dict[str, int]
) -> None:
    # At the base width, a quarter, there would be half a head of those few.
    ours, theirs = (manifest_of(recipe(family, model=shape), 257) for shape in (few, many))
    assert [each.title for each in ours.entries] == [each.title for each in theirs.entries]
    for one, other in zip(ours.entries, theirs.entries, strict=True):
        assert one.factors == other.factors, one.title
    assert ours.multipliers == theirs.multipliers


def test_keys_of_a_model_with_a_single_head_are_no_outputs() -> None:
    single = recipe(model={"width": 16, "heads": 1, "kv_heads": 1}, mup={"base_width": 64})
    entry = manifest_of(single, VOCABULARY).by_name["layers.0.blocks.0.mixer.key.weight"][0]
    assert (entry.role, entry.fan_in, entry.fan_out, entry.factors.initial) == (
        "hidden",
        0.25,
        0.25,
        1.0,
    )
