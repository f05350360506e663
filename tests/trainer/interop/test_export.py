"""Exported folders load in transformers and compute the same logits."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.saved_model import SavedModel

SHAPES = {
    "plain": ModelSection(width=32, heads=4, layers=2),
    "grouped": ModelSection(width=32, heads=4, kv_heads=2, layers=3, ffn_width=48),
    "tied": ModelSection(width=32, heads=2, head_width=24, tie_embeddings=True, layers=2),
    "normed": ModelSection(
        width=32, heads=4, kv_heads=1, head_width=12, query_key_norm=True, layers=2
    ),
    "far": ModelSection(width=32, heads=4, rope_base=500.0, norm_epsilon=1e-2, layers=1),
}
TEXT = "def f(x):  # naïve 日本\n    return x\n"

# Loads every folder that is named, and writes ids, decoded text, class and logits.
LOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
told, logits = {}, {}
for folder in map(Path, sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids
    with torch.no_grad():
        logits[folder.name] = model(ids).logits
    told[folder.name] = {
        "class": type(model).__name__,
        "ids": ids[0].tolist(),
        "text": tokenizer.decode(ids[0], skip_special_tokens=True),
        "end": model.generation_config.eos_token_id,
    }
save_file(logits, sys.argv[2])
print(json.dumps(told))
"""


def load_in_transformers(
    folders: Sequence[Path], work: Path
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what transformers says of each folder, and its logits of `TEXT`."""
    work.mkdir(exist_ok=True)
    # Isolated (-I): the bare folder `kernels` would shadow a package that transformers probes.
    command = [sys.executable, "-I", "-c", LOAD, TEXT, str(work / "logits"), *map(str, folders)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), load_file(work / "logits")


def saved(model: ModelSection, tokenizer: Tokenizer, run: Path) -> SavedModel:
    """Return a model as if loaded from a run folder, with weights far enough from their start that
    every one of them matters.
    """
    run.mkdir()
    tokenizer.save(run / TOKENIZER_NAME)
    built = LanguageModel(model, tokenizer.vocabulary_size)
    built.initialise(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return SavedModel(built, tokenizer, RunConfig(model=model), step=1)


def test_transformers_computes_the_same_logits_for_every_shape(tmp_path: Path) -> None:
    bpe = train_bpe(iter([TEXT * 20]), 270)
    models: dict[str, SavedModel] = {}
    for name, shape in SHAPES.items():
        tokenizer = bpe if name == "grouped" else byte_tokenizer()
        models[name] = saved(shape, tokenizer, tmp_path / f"run-{name}")
        export_hf(models[name], tmp_path / f"run-{name}", tmp_path / name)
    told, logits = load_in_transformers([tmp_path / name for name in SHAPES], tmp_path / "work")
    for name, ours in models.items():
        ids = [ours.tokenizer.end_of_text, *ours.tokenizer.encode(TEXT)]
        assert told[name] == {
            "class": "Qwen3ForCausalLM" if name == "normed" else "LlamaForCausalLM",
            "ids": ids,
            "text": TEXT,
            "end": ours.tokenizer.end_of_text,
        }
        with torch.no_grad():
            expected = ours.model.logits(torch.tensor([ids]))
        assert float(expected.abs().max()) > 1
        torch.testing.assert_close(logits[name], expected, rtol=1e-5, atol=1e-5)


def test_a_run_is_exported_by_the_command_line(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    done = interlace("train", *tiny, f"run.dir={run}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    done = interlace("export", str(run), "--to", "hf", str(exported))
    assert done.returncode == 0, done.stderr
    assert f"wrote LlamaForCausalLM to {exported}" in done.stdout
    assert sorted(path.name for path in exported.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model = saved(SHAPES["far"], byte_tokenizer(), tmp_path / "run")
    target = tmp_path / "full"
    target.mkdir()
    save_file({"precious": torch.ones(1)}, target / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        export_hf(model, tmp_path / "run", target)
    assert str(caught.value) == (
        f"--to hf {target}: exists and is not an empty folder; name a new one"
    )
    assert list(load_file(target / "model.safetensors")) == ["precious"]


def test_a_pattern_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    shape = ModelSection(width=32, heads=4, layers=1, pattern="AFF")
    with pytest.raises(ConfigError) as caught:
        export_hf(
            saved(shape, byte_tokenizer(), tmp_path / "run"), tmp_path / "run", tmp_path / "out"
        )
    assert str(caught.value) == (
        "model.pattern=AFF: transformers' Llama is AF repeated; no class fits this one"
    )
    assert not (tmp_path / "out").exists()
