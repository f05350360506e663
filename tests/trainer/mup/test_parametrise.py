"""Forward multipliers last through whatever is done to a model, and can be multiplied away."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import LENGTHS, load_in_transformers, tokens_of
from mup_cases import FAMILIES, VOCABULARY, model_of, recipe
from torch import nn
from torch.optim.swa_utils import AveragedModel

from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import byte_tokenizer
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.model_folder import write_model_folder
from interlace.trainer.models.channel.moe import Router
from interlace.trainer.models.channel.swiglu import SwiGLU
from interlace.trainer.models.language_model import Block, LanguageModel
from interlace.trainer.models.layers import RMSNorm
from interlace.trainer.models.mixers.attention import Attention
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import manifest_of, skeleton
from interlace.trainer.mup.parametrise import built, fold
from interlace.trainer.saved_model import SavedModel, load_saved_model

TOKENS = torch.arange(24).view(2, 12) * 7 % VOCABULARY

DEEP: dict[str, dict[str, Any]] = {"model": {"layers": 2}, "mup": {"base_layers": 1}}


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


def multipliers(model: nn.Module) -> dict[str, float]:
    """Return every forward multiplier that there can be, and its number."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Block | RMSNorm | Router):
            found[f"{name}.multiplier"] = module.multiplier
        if isinstance(module, Attention):
            found[f"{name}.score_scale"] = module.score_scale
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_holds_the_numbers_of_its_manifest_and_no_others(family: str) -> None:
    config = recipe(family, **DEEP)
    here, plain = multipliers(model_of(config)), multipliers(skeleton(config, VOCABULARY))
    wanted = manifest_of(config, VOCABULARY).multipliers
    assert wanted.keys() <= here.keys()
    assert here == plain | wanted
    assert sum(here[path] != plain[path] for path in here) >= 5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folded_model_computes_the_same_as_one_without_mup(family: str) -> None:
    config = recipe(family, **DEEP)
    model = model_of(config, spread=0.1)
    expected, weights = logits(model), copy.deepcopy(model.state_dict())
    plain_config = fold(model, config)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert not plain_config.mup.enabled
    # Its weights are those of a model that nothing is multiplied in.
    with torch.device("meta"):
        plain = built(plain_config, VOCABULARY, torch.float64)
    plain.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-9, atol=1e-9)
    assert multipliers(plain) == multipliers(skeleton(config, VOCABULARY))
    # And it was the multipliers that were folded: the old weights without them differ.
    plain.load_state_dict(weights, assign=True)
    assert (logits(plain) - expected).abs().max() > 1e-3


def test_the_recipe_of_a_folded_model_is_a_valid_one() -> None:
    config = recipe("hybrid", mup={"without": ["epsilon", "row_blocks"]})
    assert validate(fold(model_of(config), config).model_dump()).mup.without == []


def test_a_block_without_a_residual_matrix_cannot_be_folded_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("gate.weight", "up.weight", "down.weight")
    monkeypatch.setattr(SwiGLU, "roles", lambda config: dict.fromkeys(names, "hidden"))
    flat = recipe()
    fold(model_of(flat), flat)
    config = recipe(**DEEP)
    with pytest.raises(ConfigError) as caught:
        fold(model_of(config), config)
    assert str(caught.value) == (
        "model.pattern: the mixer F has no parameter with the role `residual`, so what "
        "mup.base_layers multiplies its results with (0.5) cannot be put into its weights; declare "
        "which of them writes into the residual stream"
    )


@pytest.mark.parametrize("family", ["transformer", "wide heads", "hybrid", "experts", "energy"])
def test_copies_averages_and_reloaded_weights_keep_the_multipliers(family: str) -> None:
    config = recipe(family, **DEEP)
    model = model_of(config, torch.float32, spread=0.1)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(logits(average.module), expected)
    with torch.device("meta"):
        assigned = built(config, VOCABULARY, torch.float32)
    # Copies: tensors that are shared are read as they lie.
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(logits(assigned.eval()), expected)
    assert model.state_dict().keys() == skeleton(config, VOCABULARY).state_dict().keys()


def test_compiled_layers_multiply_with_the_same_numbers() -> None:
    config = recipe("wide heads", **DEEP)
    model = model_of(config, torch.float32, spread=0.1)
    expected = logits(model)
    torch.compiler.reset()
    for layer in model.layers:
        # What matters is what is traced, not the code that is made of it.
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["transformer", "hybrid", "experts", "energy, adaln"])
def test_a_model_folder_has_the_recipe_and_loads_as_the_same_model(
    family: str, tmp_path: Path
) -> None:
    config = recipe(family, **DEEP)
    model = model_of(config, torch.float32, spread=0.1)
    write_model_folder(
        model.state_dict(), config, byte_tokenizer(), tmp_path, description="under muP"
    )
    again = load_saved_model(tmp_path)
    assert again.config.mup == config.mup
    assert multipliers(again.model) == multipliers(model)
    assert torch.equal(logits(again.model), logits(model))


def saved_model(config: RunConfig, run: Path) -> SavedModel:
    run.mkdir()
    byte_tokenizer().save(run / TOKENIZER_NAME)
    model = model_of(config, torch.float32, spread=0.05)
    assert isinstance(model, LanguageModel)
    return SavedModel(model, byte_tokenizer(), config, step=1)


@pytest.mark.parametrize("family", ["normed wide heads", "experts", "tied"])
def test_an_exported_model_is_read_back_as_one_that_computes_the_same(
    family: str, tmp_path: Path
) -> None:
    saved = saved_model(recipe(family, **DEEP), tmp_path / "run")
    expected = logits(saved.model)
    export_hf(saved, tmp_path / "run", tmp_path / "out")
    again = load_saved_model(tmp_path / "out")
    assert not again.config.mup.enabled
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_transformers_computes_the_same_from_what_is_exported(tmp_path: Path) -> None:
    folders: list[Path] = []
    expected: dict[str, torch.Tensor] = {}
    tokens = tokens_of(LENGTHS[-1])
    for family in ("normed wide heads", "experts"):
        saved = saved_model(recipe(family, **DEEP), tmp_path / f"run {family}")
        with torch.no_grad():
            expected[family] = saved.model.logits(tokens)
        folders.append(tmp_path / family)
        export_hf(saved, tmp_path / f"run {family}", folders[-1])
    _, found = load_in_transformers(folders, tmp_path / "again")
    for family, wanted in expected.items():
        torch.testing.assert_close(found[f"{family}/{LENGTHS[-1]}"], wanted, rtol=1e-4, atol=1e-5)
