"""The `mup` package as the oracle: spreads, multipliers and learning rates, tensor by tensor.

`mup` 1.0.0 is right for a Transformer whose matrices are tensors of their own, and there ours are
its numbers. Where they differ, each shown below with both (m is the growth of the width):

* Tied embeddings start wider by sqrt(m) in `mup`; here as at the base, being a table of inputs.
* One head of keys and values (width to a fixed size): `mup` refuses the matrix, or takes it for a
  vector if told not to; here it is a readout that nothing divides, with its rate and start.
* The router of experts: the same there; here its logits are divided by m.
* Stacked experts (E, out, in) under gradient descent: `mup` takes E for the fan-out and the fan-out
  for the fan-in; here the last two sides count.
* Mamba-2's fused projection and its convolution: one growth for all rows there, between that of x
  and none; here each block of rows has its own, as B and C do not grow.
* Adam's epsilon: constant there; here it follows the gradient it is compared with, by 1 / m.
* Decay of vectors: there like all others; here norms do not decay.
* A decay that nobody set: `MuAdamW` drops it to 0; here it is the rule's own.
* Scores of heads that widen: left to the user there; here divided by the width of a head.
* Copies lose `mup`'s shapes, and its readout then fails; here numbers live in modules and groups.
"""

import copy
import math

import mup
import pytest
import torch
from mup_cases import BASE, VOCABULARY, WIDTH, Twin, recipe, twin_of
from torch import nn

from interlace.kernels.update import SGD, AdamW
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest, manifest_of, skeleton
from interlace.trainer.mup.parametrise import built
from interlace.trainer.mup.widths import at_width
from interlace.trainer.optimizer import parameter_groups

M = WIDTH / BASE


def prepared(config: RunConfig, *, tied: bool = False) -> Twin:
    """Return the twin as mup prepares it: base and delta model, and its own rescaled start."""
    torch.manual_seed(0)
    base, delta = twin_of(config, BASE, tied=tied), twin_of(config, 2 * BASE, tied=tied)
    return mup.set_base_shapes(twin_of(config, tied=tied), base, delta=delta)


def settings_of(model: nn.Module, groups: list[dict[str, object]], key: str) -> dict[str, float]:
    """Return a setting of the group that each parameter is in, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: float(group[key]) for group in groups for p in group["params"]}


def ours(
    config: RunConfig, rule: AdamW | SGD, manifest: Manifest | None = None
) -> tuple[Model, list[dict[str, object]]]:
    """Return our model without memory, and its parameter groups."""
    model = skeleton(config, VOCABULARY)
    manifest = manifest or manifest_of(config, VOCABULARY)
    return model, parameter_groups(model, rule.hyperparameters(), manifest)


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [(AdamW(3e-3, weight_decay=0.1), mup.MuAdamW), (SGD(3e-3, weight_decay=0.1), mup.MuSGD)],
    ids=["adam", "sgd"],
)
def test_every_tensor_has_the_learning_rate_and_decay_of_mup(
    rule: AdamW | SGD, theirs: object
) -> None:
    config = recipe(optimizer={"rule": rule.name})
    twin = prepared(config)
    reference = theirs(twin.parameters(), lr=3e-3, weight_decay=0.1).param_groups
    model, groups = ours(config, rule)
    rates = settings_of(model, groups, "lr")
    assert rates == pytest.approx(settings_of(twin, reference, "lr"), rel=1e-12)
    assert len(set(rates.values())) > 1 and len(rates) == len(list(twin.parameters()))
    decays = settings_of(model, groups, "weight_decay")
    expected = settings_of(twin, reference, "weight_decay")
    vectors = {name for name, parameter in twin.named_parameters() if parameter.ndim < 2}
    assert {decays[name] for name in vectors} == {0.0}
    for name in expected.keys() - vectors:
        assert decays[name] == pytest.approx(expected[name], rel=1e-12), name


def test_every_tensor_s_spread_grows_or_falls_with_the_width_as_in_mup() -> None:
    config = recipe()
    twin, base_twin = prepared(config), prepared(at_width(config, BASE))
    model, base = (initialised(each) for each in (config, at_width(config, BASE)))
    here, there = dict(model.named_parameters()), dict(base.named_parameters())
    theirs, theirs_at_base = dict(twin.named_parameters()), dict(base_twin.named_parameters())
    assert here.keys() == theirs.keys()
    for name in here:
        if here[name].ndim < 2:
            assert torch.equal(here[name], theirs[name])
            continue
        growth, expected = (
            float(wide.detach().double().std() / narrow.detach().double().std())
            for wide, narrow in ((here[name], there[name]), (theirs[name], theirs_at_base[name]))
        )
        # The spread of 1,024 draws, the fewest here, is known to 2 %.
        assert growth == pytest.approx(expected, rel=0.08), name
        exact = 1.0 if name in {"embedding.weight", "head.weight"} else M**-0.5
        assert growth == pytest.approx(exact, rel=0.08), name


def initialised(config: RunConfig) -> LanguageModel:
    """Return our model with its values and multipliers."""
    with torch.device("meta"):
        model = built(config, VOCABULARY, torch.float32)
    assert isinstance(model, LanguageModel)
    model.to_empty(device="cpu")
    model.initialise(config.run.seed, manifest_of(config, VOCABULARY).rescale)
    return model


def test_the_logits_are_those_of_a_readout_of_mup_on_the_same_stack() -> None:
    config = recipe()
    model, twin = initialised(config), prepared(config)
    tokens = torch.arange(24).view(2, 12) * 9 % VOCABULARY
    with torch.no_grad():
        twin.head.weight.copy_(model.head_weight())
        logits = model.logits(tokens)
        model.norm.multiplier = 1.0
        hidden, _ = model.hidden(tokens, None, None)
        torch.testing.assert_close(logits, twin.head(hidden), rtol=1e-5, atol=1e-7)
    assert manifest_of(config, VOCABULARY).multipliers == {"norm.multiplier": 1 / M}


def test_a_tied_table_keeps_its_spread_which_mup_lets_grow() -> None:
    config = recipe("tied")
    twin, base = prepared(config, tied=True), prepared(at_width(config, BASE), tied=True)
    theirs = float((twin.embedding.weight.std() / base.embedding.weight.std()).detach())
    assert theirs == pytest.approx(math.sqrt(M), rel=0.05)
    model, narrow = initialised(config), initialised(at_width(config, BASE))
    here = float((model.embedding.weight.std() / narrow.embedding.weight.std()).detach())
    assert here == pytest.approx(1.0, rel=0.05)
    # Rate and multiplier are the same in both.
    groups = mup.MuAdam(twin.parameters(), lr=1.0).param_groups
    own, own_groups = ours(config, AdamW(1.0))
    name = "embedding.weight"
    assert settings_of(twin, groups, "lr")[name] == settings_of(own, own_groups, "lr")[name] == 1.0
    assert twin.head.output_mult / twin.head.width_mult() == model.norm.multiplier == 1 / M


def test_keys_of_one_head_follow_the_width_where_mup_takes_them_for_vectors() -> None:
    config = recipe("one key head")
    with pytest.raises(AssertionError, match="infinite fan-in and finite fan-out"):
        prepared(config)
    twin = twin_of(config)
    base, delta = twin_of(config, BASE), twin_of(config, 2 * BASE)
    mup.set_base_shapes(twin, base, delta=delta, do_assert=False)
    name = "layers.0.blocks.0.mixer.key.weight"
    assert settings_of(twin, mup.MuAdam(twin.parameters(), lr=1.0).param_groups, "lr")[name] == 1.0
    assert settings_of(twin, mup.MuSGD(twin.parameters(), lr=1.0).param_groups, "lr")[name] == M
    for rule in (AdamW(1.0), SGD(1.0)):
        model, groups = ours(recipe("one key head", optimizer={"rule": rule.name}), rule)
        assert settings_of(model, groups, "lr")[name] == 1 / M
    [entry] = manifest_of(config, VOCABULARY).by_name[name]
    assert (entry.role, entry.factors.initial) == ("readout", M**-0.5)


def seen_by_mup(config: RunConfig) -> Model:
    """Return our own model with mup's shapes on it; its asserts know torch's modules only."""
    model, base, delta = (
        skeleton(each, VOCABULARY)
        for each in (config, at_width(config, BASE), at_width(config, 2 * BASE))
    )
    return mup.set_base_shapes(model, base, delta=delta, rescale_params=False)


def test_a_router_s_logits_are_divided_by_the_width_where_mup_sees_a_vector() -> None:
    config = recipe("experts")
    model, name = seen_by_mup(config), "layers.0.blocks.1.mixer.router.weight"
    assert dict(model.named_parameters())[name].infshape.ninf() == 1
    manifest = manifest_of(config, VOCABULARY)
    [entry] = manifest.by_name[name]
    assert (entry.role, entry.fan_in, entry.factors.lr) == ("readout", M, 1.0)
    assert manifest.multipliers["layers.0.blocks.1.mixer.router.multiplier"] == 1 / M


def test_stacked_experts_have_the_rate_of_matrices_where_mup_takes_their_number_for_a_side() -> (
    None
):
    name = "layers.0.blocks.1.mixer.experts.gate"
    config = recipe("experts", optimizer={"rule": "sgd"})
    seen = seen_by_mup(config)
    theirs = settings_of(seen, mup.MuSGD(seen.parameters(), lr=1.0).param_groups, "lr")
    model, groups = ours(config, SGD(1.0))
    assert (theirs[name], settings_of(model, groups, "lr")[name]) == (1 / M, 1.0)
    # As one matrix of its own, mup has our rate.
    assert theirs["layers.0.blocks.1.mixer.shared.gate.weight"] == 1.0
    adam = mup.MuAdam(seen.parameters(), lr=1.0).param_groups
    model, groups = ours(recipe("experts"), AdamW(1.0))
    assert settings_of(seen, adam, "lr")[name] == settings_of(model, groups, "lr")[name] == 1 / M


def test_blocks_of_rows_grow_by_themselves_where_mup_sees_one_growth() -> None:
    config = recipe("hybrid", optimizer={"rule": "sgd"})
    shapes = {n: p.infshape for n, p in seen_by_mup(config).named_parameters()}
    inside = "layers.0.blocks.0.mixer"
    projection, taps = shapes[f"{inside}.in_proj.weight"], shapes[f"{inside}.conv.weight"]
    # z, x and steps grow by 4, B and C (16 of 152 rows at the base) do not.
    assert projection.fanin_fanout_mult_ratio() == pytest.approx(4 / (560 / 152))
    assert taps.width_mult() == pytest.approx(272 / 80)
    manifest = manifest_of(config, VOCABULARY)
    rows = {e.rows: e for e in manifest.by_name[f"{inside}.in_proj.weight"]}
    assert {name: e.factors.lr for name, e in rows.items()} == {
        "z": 1.0,
        "x": 1.0,
        "B": 1 / M,
        "C": 1 / M,
        "dt": 1.0,
    }
    taps_here = {e.rows: e.factors.lr for e in manifest.by_name[f"{inside}.conv.weight"]}
    assert taps_here == {"x": M, "B": 1.0, "C": 1.0}


def test_epsilon_follows_the_gradient_where_mup_leaves_it() -> None:
    config = recipe()
    twin = prepared(config)
    theirs = settings_of(twin, mup.MuAdam(twin.parameters(), lr=1.0, eps=1e-8).param_groups, "eps")
    assert set(theirs.values()) == {1e-8}
    model, groups = ours(config, AdamW(1.0, eps=1e-8))
    assert set(settings_of(model, groups, "eps").values()) == {1e-8 / M}


def test_a_decay_that_nobody_set_is_the_rule_s_own_where_mup_drops_it() -> None:
    config = recipe()
    twin = prepared(config)
    name = "layers.0.blocks.0.mixer.query.weight"
    groups = mup.MuAdamW(twin.parameters(), lr=1.0).param_groups
    assert settings_of(twin, groups, "weight_decay")[name] == 0.0
    assert torch.optim.AdamW(twin.parameters()).param_groups[0]["weight_decay"] == 0.01
    model, own = ours(config, AdamW(1.0))
    assert settings_of(model, own, "weight_decay")[name] == pytest.approx(0.01 * M)


def test_scores_of_widening_heads_are_divided_by_their_width_which_mup_leaves_to_its_user() -> None:
    manifest = manifest_of(recipe("wide heads"), VOCABULARY)
    scale = manifest.multipliers["layers.0.blocks.0.mixer.score_scale"]
    # Heads of 32 in place of 8: 1 / sqrt(8) there, and a quarter of it here.
    assert scale == pytest.approx(8**-0.5 / M)
    model = skeleton(recipe(), VOCABULARY)
    assert model.get_submodule("layers.0.blocks.0.mixer").score_scale == pytest.approx(8**-0.5)


def test_a_copy_keeps_its_multipliers_where_mup_s_loses_them() -> None:
    config = recipe()
    twin, model = copy.deepcopy(prepared(config)), copy.deepcopy(initialised(config))
    hidden, tokens = torch.ones(1, WIDTH), torch.arange(6)[None]
    with pytest.raises(AssertionError, match="set_base_shapes"):
        twin.head(hidden)
    assert torch.equal(model.logits(tokens), initialised(config).logits(tokens))
    assert model.norm.multiplier == 1 / M
