"""What the `mup` package says of a model becomes a manifest, and a manifest its base-shape file."""

from pathlib import Path

import mup
import pytest
import torch
import yaml
from mup_cases import BASE, FAMILIES, VOCABULARY, WIDTH, recipe, twin_of
from torch import nn

from interlace.kernels.update import SGD, AdamW
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.mup_shapes import (
    base_shapes_of,
    manifest_of_mup,
    write_base_shapes,
)
from interlace.trainer.mup.manifest import UNSCALED, manifest_of, skeleton
from interlace.trainer.mup.widths import at_width
from interlace.trainer.optimizer import parameter_groups

M = WIDTH / BASE


@pytest.mark.parametrize("family", list(FAMILIES))
def test_our_base_shape_file_is_the_one_that_mup_writes(family: str, tmp_path: Path) -> None:
    config = recipe(family)
    model, base, delta = (
        skeleton(each, VOCABULARY)
        for each in (config, at_width(config, BASE), at_width(config, 2 * BASE))
    )
    write_base_shapes(manifest_of(config, VOCABULARY), model, tmp_path / "ours.bsh")
    mup.make_base_shapes(base, delta, str(tmp_path / "theirs.bsh"))
    ours, theirs = (
        yaml.safe_load((tmp_path / name).read_text()) for name in ("ours.bsh", "theirs.bsh")
    )
    assert ours == theirs
    assert {name: len(shape) for name, shape in ours.items()} == {
        name: parameter.ndim for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("family", ["transformer", "wide heads", "energy, adaln"])
def test_a_manifest_comes_back_from_a_model_that_mup_prepared_with_its_file(
    family: str, tmp_path: Path
) -> None:
    config = recipe(family, mup={"without": ["epsilon"]})
    model, manifest = skeleton(config, VOCABULARY), manifest_of(config, VOCABULARY)
    write_base_shapes(manifest, model, tmp_path / "shapes.bsh")
    mup.set_base_shapes(model, str(tmp_path / "shapes.bsh"), rescale_params=False)
    found = manifest_of_mup(model, without=["epsilon"])
    for ours, again in zip(manifest.entries, found.entries, strict=True):
        assert (again.name, again.shape) == (ours.name, ours.shape)
        assert (again.role, again.fan_in, again.fan_out) == (ours.role, ours.fan_in, ours.fan_out)
        if ours.role != "readout":  # Our output matrices are no MuReadout, so nothing divides them.
            assert again.factors == ours.factors
    assert found.multipliers == {}


def test_a_model_of_mup_s_own_modules_trains_with_the_groups_of_its_manifest() -> None:
    config = recipe()
    base, delta = twin_of(config, BASE), twin_of(config, 2 * BASE)
    twin = mup.set_base_shapes(twin_of(config), base, delta=delta)
    for rule, theirs in ((AdamW(3e-3), mup.MuAdam), (SGD(3e-3), mup.MuSGD)):
        manifest = manifest_of_mup(twin, scale_free=rule.scale_free, without=["epsilon"])
        groups = parameter_groups(twin, rule.hyperparameters(), manifest)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        reference = theirs(twin.parameters(), lr=3e-3).param_groups
        expected = {id(p): group["lr"] for group in reference for p in group["params"]}
        assert rates == pytest.approx(expected, rel=1e-12)
    assert manifest.multipliers == {"head.multiplier": 1 / M}
    [head] = manifest.by_name["head.weight"]
    assert (head.role, head.factors.initial) == ("readout", M**0.5)
    ours = manifest_of(recipe(optimizer={"rule": "sgd"}, mup={"without": ["epsilon"]}), VOCABULARY)
    differing = {
        mine.name for mine, here in zip(ours.entries, manifest.entries, strict=True) if mine != here
    }
    # Its start falls with the fan-in by itself in torch, and is constant here.
    assert differing == {"head.weight"}


def test_a_tied_readout_is_a_table_of_inputs_and_keeps_its_multiplier() -> None:
    config = recipe("tied")
    base, delta = twin_of(config, BASE, tied=True), twin_of(config, 2 * BASE, tied=True)
    twin = mup.set_base_shapes(twin_of(config, tied=True), base, delta=delta)
    manifest = manifest_of_mup(twin)
    [table] = manifest.by_name["embedding.weight"]
    assert (table.role, table.fan_in, table.fan_out) == ("input", 1.0, M)
    assert manifest.multipliers == {"head.multiplier": 1 / M}


def test_a_matrix_from_the_width_to_a_fixed_size_is_a_readout_that_nothing_divides() -> None:
    config = recipe("one key head")
    base, delta = twin_of(config, BASE), twin_of(config, 2 * BASE)
    twin = mup.set_base_shapes(twin_of(config), base, delta=delta, do_assert=False)
    ours = manifest_of(config, VOCABULARY).by_name["layers.1.blocks.0.mixer.value.weight"]
    assert manifest_of_mup(twin).by_name["layers.1.blocks.0.mixer.value.weight"] == ours


def test_a_model_that_mup_has_not_seen_is_refused() -> None:
    twin = twin_of(recipe())
    with pytest.raises(ConfigError, match=r"^embedding\.weight: has no infshape.*call mup\.set_"):
        manifest_of_mup(twin)


def test_a_stack_that_grows_in_front_is_refused() -> None:
    class Stack(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width, width, width))

    model = mup.set_base_shapes(Stack(8), Stack(2), delta=Stack(4))
    with pytest.raises(ConfigError, match=r"weight: 3 of its sides grow, of which 1 before"):
        manifest_of_mup(model)


def test_a_manifest_of_another_model_is_refused() -> None:
    model = skeleton(recipe("tied"), VOCABULARY)
    with pytest.raises(ConfigError, match=r"not of this model: head\.weight differs"):
        base_shapes_of(manifest_of(recipe(), VOCABULARY), model)
    with pytest.raises(ConfigError, match="not of this model"):
        base_shapes_of(UNSCALED, model)


def test_without_pyyaml_the_way_to_get_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    model = skeleton(recipe(), VOCABULARY)
    with pytest.raises(ConfigError, match=r"type pip install --no-deps mup==1\.0\.0 pyyaml"):
        write_base_shapes(manifest_of(recipe(), VOCABULARY), model, tmp_path / "shapes.bsh")
