"""An exported energy-based model runs from its folder, without this project, and says the same."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from energy_cases import SETTINGS, SHAPES, VOCABULARY, build

from interlace.launch.cli import main
from interlace.trainer.config.schema import RunConfig, TrainSection
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import byte_tokenizer
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.model_folder import write_model_folder
from interlace.trainer.saved_model import SavedModel

CASES = {
    "S1": ("plain", "S1"),
    "grouped": ("grouped", "S2"),
    "mixed": ("mixed", "on logits"),
    "without positions": ("without positions", "through all steps"),
    "adaLN": ("mixed", "adaLN"),
    "tokens' table": ("grouped", "tokens' table"),
}


def exported(name: str, tmp_path: Path) -> tuple[SavedModel, Path]:
    """Export a small model; return it and the folder."""
    shape, settings = SHAPES[CASES[name][0]], SETTINGS[CASES[name][1]]
    tokenizer = byte_tokenizer()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tokenizer.save(source / TOKENIZER_NAME)
    config = RunConfig(model=shape, energy=settings, train=TrainSection(objective="energy"))
    saved = SavedModel(build(shape, settings, torch.float32), tokenizer, config, 0)
    assert export_hf(saved, source, target) == "EnergyTransformer"
    return saved, target


def loaded(folder: Path) -> Any:
    """Run the folder's own loader on it, in double precision."""
    spec = importlib.util.spec_from_file_location("exported", folder / "energy_transformer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.EnergyTransformer(folder)
    model.weights = {name: weight.double() for name, weight in model.weights.items()}
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_folder_s_own_loader_has_the_logits_of_the_model(name: str, tmp_path: Path) -> None:
    _, folder = exported(name, tmp_path)
    shape, settings = SHAPES[CASES[name][0]], SETTINGS[CASES[name][1]]
    exact = build(shape, settings, torch.float32)
    exact.to(torch.float64)
    exact.compute_dtype = torch.float64
    tokens = torch.arange(2 * 19).view(2, 19) * 5 % VOCABULARY
    theirs = loaded(folder)
    # Rotary angles are in fp32 on both sides; the model's logits are handed out in fp32.
    torch.testing.assert_close(
        theirs.logits(tokens).float(), exact.logits(tokens), rtol=1e-5, atol=1e-5
    )
    longer = theirs.logits(tokens, steps=5)
    assert (longer - theirs.logits(tokens)).abs().max() > 1e-3


def test_text_from_the_loader_is_the_model_s_own(tmp_path: Path) -> None:
    saved, folder = exported("S1", tmp_path)
    theirs = loaded(folder)
    theirs.end_of_text = VOCABULARY
    found = theirs.generate(torch.tensor([[3]]), 6, temperature=0.0)
    tokens = torch.tensor([[3]])
    for token in found:
        assert int(saved.model.logits(tokens)[0, -1].argmax()) == token
        tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
    assert len(found) == 6


def test_the_loader_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    _, folder = exported("S1", tmp_path)
    tree = ast.parse((folder / "energy_transformer.py").read_text(encoding="utf-8"))
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
    standard = {"collections", "hashlib", "json", "math", "pathlib", "typing"}
    assert roots == standard | {"torch", "safetensors"}


def test_the_folder_names_every_weight_that_it_holds(tmp_path: Path) -> None:
    _, folder = exported("adaLN", tmp_path)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for name in loaded(folder).weights:
        last = name.split(".")[-2] if "." in name else name
        parts = ("step_size", "modulations", "query", "gate", "norm", "embedding")
        described = last in readme or any(part in name and part in readme for part in parts)
        assert described, name


def test_an_energy_model_is_not_hybridized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, _ = exported("S1", tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    weights = saved.model.state_dict()
    write_model_folder(weights, saved.config, saved.tokenizer, folder, description="one")
    assert main(["hybridize", str(folder), "--keep-attention", "every=2"]) == 2
    assert capsys.readouterr().err == (
        f"interlace: {folder}: its train.objective=energy has no student that distills it; only "
        "language models are hybridized\n"
    )
