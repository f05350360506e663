"""Models that transformers computes as well, and what it makes of them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import DataSection, RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer, byte_tokenizer
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.saved_model import SavedModel

TEXT = "def f(x):  # naïve 日本\n    return x\n"
LENGTHS = (1, 63, 64, 65, 197)
"""Around one chunk of 64 positions, and in the middle of the fourth."""

MAMBA = {"mamba_head_width": 16, "mamba_state_width": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"layers": 2},
    "grouped": {"kv_heads": 2, "layers": 3, "ffn_width": 48},
    "tied": {"heads": 2, "head_width": 24, "tie_embeddings": True, "layers": 2},
    "normed": {"kv_heads": 1, "head_width": 12, "query_key_norm": True, "layers": 2},
    "far": {"rope_base": 500.0, "norm_epsilon": 1e-2, "layers": 1},
    "hybrid": {"pattern": "MF AF", "layers": 2, "kv_heads": 2, "mamba_groups": 2, **MAMBA},
    "experts": {
        "pattern": "ME*2 AE",
        "layers": 1,
        "positions": "none",
        "tie_embeddings": True,
        "moe_experts": 5,
        "moe_shared_experts": 2,
        "moe_expert_width": 24,
        "mamba_conv_width": 3,
        **MAMBA,
    },
    "attention with experts": {"pattern": "AE", "layers": 2, "head_width": 12},
    "without positions": {"pattern": "AF", "layers": 2, "positions": "none"},
    "narrow": {"pattern": "MF*2 AF", "layers": 1, "mamba_expand": 1.0, "mamba_groups": 2, **MAMBA},
}
CLASSES = {
    name: "Llama" if number < 5 else "GraniteMoeHybrid" for number, name in enumerate(SHAPES)
} | {"normed": "Qwen3"}

# For every folder that is named: ids and decoded text, class, logits of a text, of so many first
# tokens, and token by token; and the model again, as transformers writes it.
LOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
text, target, lengths = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
told, found = {}, {}
torch.set_grad_enabled(False)
for folder in map(Path, sys.argv[4:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    name = folder.name
    found[f"{name}/text"] = model(ids).logits
    tokens = torch.arange(lengths[-1])[None] * 7 % 250
    for length in lengths:
        found[f"{name}/{length}"] = model(tokens[:, :length]).logits
    cache, steps = None, []
    for token in tokens.unbind(1):
        out = model(token[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    found[f"{name}/steps"] = torch.cat(steps, 1)
    model.save_pretrained(target / name)
    tokenizer.save_pretrained(target / name)
    told[name] = {
        "class": type(model).__name__,
        "ids": ids[0].tolist(),
        "text": tokenizer.decode(ids[0], skip_special_tokens=True),
        "end": model.generation_config.eos_token_id,
    }
save_file(found, target / "logits")
print(json.dumps(told))
"""


def tokens_of(length: int) -> torch.Tensor:
    """Return the (1, length) tokens that the script computes logits of."""
    return torch.arange(length)[None] * 7 % 250


def load_in_transformers(
    folders: list[Path], target: Path
) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    """Return what transformers says of each folder, and its logits; write each model anew."""
    target.mkdir(exist_ok=True)
    # Isolated (-I): the bare folder `kernels` would shadow a package that transformers probes.
    command = [sys.executable, "-I", "-c", LOAD, TEXT, str(target), json.dumps(LENGTHS)]
    done = subprocess.run(
        [*command, *map(str, folders)], cwd=target, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), load_file(target / "logits")


def shape_of(name: str) -> ModelSection:
    """Return one of the shapes, over a width of 32."""
    return ModelSection.model_validate({"width": 32, "heads": 4, **SHAPES[name]})


def saved(model: ModelSection, run: Path, tokenizer: Tokenizer | None = None) -> SavedModel:
    """Return a model as if loaded from a run folder, with weights far enough from their start that
    every one of them matters.
    """
    run.mkdir()
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save(run / TOKENIZER_NAME)
    built = LanguageModel(model, tokenizer.vocabulary_size)
    built.initialise(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = RunConfig(model=model, data=DataSection(sequence_length=64))
    return SavedModel(built, tokenizer, config, step=1)
