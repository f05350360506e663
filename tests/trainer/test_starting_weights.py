"""A new run starts from the weights its recipe names, if they fit; a resumed one does not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import saved
from safetensors.torch import load_file, save_file

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.mup_section import MupSection
from interlace.trainer.config.schema import DataSection, RunConfig, RunSection
from interlace.trainer.data.tokenizers import byte_tokenizer, train_bpe
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.model_folder import write_model_folder
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.mup.parametrise import parametrise
from interlace.trainer.saved_model import load_saved_model
from interlace.trainer.starting_weights import start_from

SHAPE = ModelSection(width=32, heads=4, layers=2, ffn_width=48)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of `SHAPE` over bytes."""
    model = saved(SHAPE, tmp_path / "run")
    target = tmp_path / "model"
    target.mkdir()
    weights = model.model.state_dict()
    write_model_folder(weights, model.config, model.tokenizer, target, description="one", step=7)
    return target


def starting(folder: Path | str, model: ModelSection = SHAPE) -> tuple[LanguageModel, RunConfig]:
    built = LanguageModel(model, 257)
    built.initialise(9)
    return built, RunConfig(model=model, run=RunSection(start_from=str(folder)))


def test_every_tensor_is_taken_over(folder: Path) -> None:
    model, config = starting(folder)
    assert start_from(model, config, byte_tokenizer()) == f"weights of {folder} (step 7)"
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_without_the_setting_a_model_keeps_its_fresh_values() -> None:
    model, config = starting("")
    assert start_from(model, config, byte_tokenizer()) is None
    again, _ = starting("")
    assert torch.equal(model.head_weight(), again.head_weight())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn_width": 64},
            "its layers.0.blocks.1.mixer.gate.weight is [48, 32], and this recipe's [64, 32]",
        ),
        (
            {"layers": 3},
            "has no layers.2.blocks.0.norm.weight, which this recipe's model has",
        ),
        (
            {"layers": 1},
            "has layers.1.blocks.0.norm.weight, which this recipe's model has not",
        ),
        ({"width": 64}, "its embedding.weight is [257, 32], and this recipe's [257, 64]"),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    model, config = starting(folder, SHAPE.model_copy(update=changes))
    with pytest.raises(ConfigError) as caught:
        start_from(model, config, byte_tokenizer())
    assert str(caught.value) == (
        f"run.start_from={folder}: {message}; type the [model] settings of that model"
    )


def test_another_tokenizer_is_refused(folder: Path) -> None:
    model, config = starting(folder)
    other = train_bpe(iter(["some text"]), 258)
    with pytest.raises(ConfigError) as caught:
        start_from(model, config, other)
    assert "is not the tokenizer of run.start_from" in str(caught.value)
    assert str(caught.value).endswith(f"type data.tokenizer={folder}/tokenizer.json")


def test_a_folder_that_is_not_there_or_holds_no_model_is_named(tmp_path: Path) -> None:
    model, config = starting(tmp_path / "gone")
    with pytest.raises(ConfigError, match="there is no such folder"):
        start_from(model, config, byte_tokenizer())
    (tmp_path / "empty").mkdir()
    model, config = starting(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds no model"):
        start_from(model, config, byte_tokenizer())


def test_a_model_folder_may_be_moved(folder: Path, tmp_path: Path) -> None:
    bpe = train_bpe(iter(["some text, some more"] * 9), 262)
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    model = saved(SHAPE, tmp_path / "other", bpe)
    made.mkdir()
    config = RunConfig(model=SHAPE, data=DataSection(tokenizer="bpe"))
    write_model_folder(model.model.state_dict(), config, bpe, made, description="one")
    made.rename(elsewhere)
    again = load_saved_model(elsewhere)
    assert again.tokenizer.backend.to_str() == bpe.backend.to_str()
    assert again.config.data.tokenizer == str(elsewhere / "tokenizer.json")
    assert torch.equal(again.model.embedding.weight, model.model.embedding.weight)


def test_a_folder_whose_weights_do_not_fit_its_recipe_is_named(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    (folder / "recipe.toml").write_text(text.replace("ffn_width = 48", "ffn_width = 64"))
    with pytest.raises(CheckpointError, match="its weights do not fit its recipe"):
        load_saved_model(folder)


def test_a_file_of_other_tensors_is_no_model(folder: Path) -> None:
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its weights have no embedding\.weight"):
        load_saved_model(folder)


def under_mup(**settings: object) -> MupSection:
    return MupSection.model_validate({"enabled": True, **settings})


@pytest.fixture
def narrow_born(tmp_path: Path) -> Path:
    """A model folder of `SHAPE` whose settings are carried over from width 16 and one layer."""
    target = tmp_path / "born"
    target.mkdir()
    config = RunConfig(model=SHAPE, mup=under_mup(base_width=16, base_layers=1))
    model = parametrised(config)
    write_model_folder(model.state_dict(), config, byte_tokenizer(), target, description="one")
    return target


def parametrised(config: RunConfig) -> LanguageModel:
    model = LanguageModel(config.model, 257)
    manifest = manifest_of(config, 257)
    parametrise(model, manifest)
    model.initialise(9, manifest.rescale)
    return model


@pytest.mark.parametrize(
    ("mup", "message"),
    [
        (
            under_mup(base_width=32, base_layers=1),
            "norm.multiplier=0.5, and this recipe has 1, so the same weights would be another "
            "model; type mup.base_width=16",
        ),
        (
            under_mup(base_width=16),
            "layers.0.blocks.0.multiplier=0.5, and this recipe has 1, so the same weights would "
            "be another model; type mup.base_layers=1",
        ),
        (
            under_mup(base_width=16, base_layers=1, without=["readout_multiplier"]),
            "norm.multiplier=0.5, and this recipe has 1, so the same weights would be another "
            "model; type mup.without=[]",
        ),
        (
            MupSection(),
            "norm.multiplier=0.5, and this recipe has 1, so the same weights would be another "
            "model; type mup.enabled=true mup.base_width=16 mup.base_layers=1",
        ),
    ],
)
def test_weights_that_were_trained_with_other_multipliers_are_refused(
    mup: MupSection, message: str, narrow_born: Path
) -> None:
    config = RunConfig(model=SHAPE, run=RunSection(start_from=str(narrow_born)), mup=mup)
    with pytest.raises(ConfigError) as caught:
        start_from(parametrised(config), config, byte_tokenizer())
    assert str(caught.value) == f"run.start_from={narrow_born}: was trained with {message}"


def test_weights_go_on_with_the_multipliers_they_were_trained_with(
    narrow_born: Path, folder: Path
) -> None:
    base = under_mup(base_width=16, base_layers=1, zero_query=True)
    config = RunConfig(model=SHAPE, run=RunSection(start_from=str(narrow_born)), mup=base)
    assert start_from(parametrised(config), config, byte_tokenizer())
    # Where the width is its own base all multipliers are one, as without muP.
    own = RunConfig(
        model=SHAPE,
        run=RunSection(start_from=str(folder)),
        mup=under_mup(base_width=32, grows="head_width"),
    )
    assert start_from(parametrised(own), own, byte_tokenizer())


def test_weights_of_a_model_without_multipliers_are_refused_where_there_are_some(
    folder: Path,
) -> None:
    config = RunConfig(
        model=SHAPE, run=RunSection(start_from=str(folder)), mup=under_mup(base_width=16)
    )
    with pytest.raises(ConfigError, match=r"norm\.multiplier=1, and this recipe has 0\.5.*") as at:
        start_from(parametrised(config), config, byte_tokenizer())
    assert str(at.value).endswith("type mup.enabled=false")


@pytest.mark.long
def test_runs_start_from_runs_and_foreign_folders_on_any_number_of_ranks(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    first = tmp_path / "first"
    done = interlace("train", *tiny, f"run.dir={first}", "train.steps=20")
    assert done.returncode == 0, done.stderr
    export_hf(load_saved_model(first), first, tmp_path / "foreign")
    runs: list[Path] = []
    for source, ranks in ((first, 1), (tmp_path / "foreign", 2)):
        runs.append(tmp_path / f"from {source.name}")
        where = [f"run.dir={runs[-1]}", f"run.start_from={source}"]
        done = interlace("train", *tiny, *where, "train.steps=2", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert f"weights of {source}" in done.stdout
        assert f'start_from = "{source}"' in (runs[-1] / "config.toml").read_text(encoding="utf-8")
    one, two = ([float.fromhex(loss) for loss in losses_of(run)] for run in runs)
    assert two == pytest.approx(one, rel=1e-5)
    fresh = [float.fromhex(loss) for loss in losses_of(first)]
    assert one[0] < fresh[0] - 0.5
    # Its own checkpoint counts now, whatever has become of the folder it started from.
    first.rename(tmp_path / "gone")
    done = interlace("train", "--resume", str(runs[0]), "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step 2" in done.stdout
    assert len(losses_of(runs[0])) == 3
