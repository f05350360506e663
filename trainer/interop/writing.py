"""Writes a folder that transformers loads: weights, `config.json` and tokenizer.

There is no class for energy-based models there: their folder brings a small loader of its own.
The tokenizer is written so that it puts the end-of-text token before a text, since every document
opened with it in training.
"""

from pathlib import Path

from safetensors.torch import save_file

from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.formats import format_for
from interlace.trainer.interop.reading import CONFIG_NAME, WEIGHTS_NAME
from interlace.trainer.model_folder import claim_new_folder
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.shapes import ffn_width, head_width, kv_heads
from interlace.trainer.run_folder import write_json
from interlace.trainer.saved_model import SavedModel, without_multipliers

ENERGY_CLASS = "EnergyTransformer"

ENERGY_README = """\
# An Energy-Based Transformer

`energy_transformer.py` runs it, with torch and safetensors and nothing else:

    from energy_transformer import EnergyTransformer
    model = EnergyTransformer(".")
    logits = model.logits(tokens)             # (B, T) int64 to (B, T, V)
    longer = model.logits(tokens, steps=8)    # think longer

Every text opens with the end-of-text token (`eos_token_id` in `config.json`); `tokenizer.json` puts
it there. Weights in `model.safetensors`, all fp32, with D the width and V the vocabulary:

| name | shape | what it is |
|---|---|---|
| `embedding.weight` | V, D | tokens |
| `layers.L.blocks.B.norm.weight` | D | gain of the norm before a block |
| `layers.L.blocks.B.mixer.{query,key,value,output}.weight` | out, in | attention, block letter A |
| `layers.L.blocks.B.mixer.{gate,up,down}.weight` | out, in | SwiGLU, block letter F |
| `norm.weight` | D | gain of the last norm |
| `candidate_proj.weight` | D, V | probabilities of a candidate to its input |
| `energy_head.weight` | 1, D | output of a candidate to its energy |
| `step_embed.weight` | steps, D | added to candidates, or read by adaLN |
| `modulations.N.weight` | 3 D, D | adaLN of block N: shift, scale, gate |
| `step_size` | 1 | factor on the gradient |

Rotary embedding is in the half-split layout; a candidate at position t stands at position t + 1.
`config.json` has the shape under `model` and the descent under `energy`.
"""


def export_hf(saved: SavedModel, source: Path, target: Path) -> str:
    """Write a folder that `transformers` loads; return the name of its class.

    Args:
        saved: The model.
        source: Its folder, which holds the tokenizer.
        target: Folder to write; must be new or empty.

    Raises:
        ConfigError: The folder is not empty, or the model has no equal there.
    """
    saved = without_multipliers(saved)
    model = saved.config.model
    if saved.config.train.objective == "energy":
        return export_energy(saved, source, target)
    known = format_for(model)
    if problems := known.obstacles(model):
        raise ConfigError(problems)
    claim_new_folder(f"--to hf {target}", target)
    tensors = known.exported(saved.model.state_dict(), model)
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
    architecture, end = known.architecture(model), saved.tokenizer.end_of_text
    about: dict[str, object] = {
        "architectures": [architecture],
        **known.settings(model),
        "vocab_size": saved.model.embedding.weight.shape[0],
        "max_position_embeddings": saved.config.data.sequence_length,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    write_json(target / CONFIG_NAME, about)
    write_json(target / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    write_tokenizer(saved, source / TOKENIZER_NAME, target)
    return architecture


def export_energy(saved: SavedModel, source: Path, target: Path) -> str:
    """Write an energy-based model with what runs it; return the name of its class.

    Args:
        saved: The model.
        source: Its folder, which holds the tokenizer.
        target: Folder to write; must be new or empty.
    """
    claim_new_folder(f"--to hf {target}", target)
    model, end = saved.config.model, saved.tokenizer.end_of_text
    state = {name: value.contiguous() for name, value in saved.model.state_dict().items()}
    save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
    shape = {
        "layers": list(layer_patterns(model)),
        "width": model.width,
        "heads": model.heads,
        "kv_heads": kv_heads(model),
        "head_width": head_width(model),
        "ffn_width": ffn_width(model),
        "query_key_norm": model.query_key_norm,
        "positions": model.positions,
        "rope_base": model.rope_base,
        "norm_epsilon": model.norm_epsilon,
    }
    about = {
        "architectures": [ENERGY_CLASS],
        "model": shape,
        "energy": saved.config.energy.model_dump(mode="json"),
        "vocab_size": saved.model.embedding.weight.shape[0],
        "max_position_embeddings": saved.config.data.sequence_length,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    write_json(target / CONFIG_NAME, about)
    write_tokenizer(saved, source / TOKENIZER_NAME, target)
    loader = Path(__file__).with_name("energy_loader.py").read_text(encoding="utf-8")
    (target / "energy_transformer.py").write_text(loader, encoding="utf-8")
    (target / "README.md").write_text(ENERGY_README, encoding="utf-8")
    return ENERGY_CLASS


def write_tokenizer(saved: SavedModel, source: Path, target: Path) -> None:
    """Write the tokenizer so that texts open with the end-of-text token, as in training."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(source))
    special = backend.id_to_token(saved.tokenizer.end_of_text)
    backend.post_processor = TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, saved.tokenizer.end_of_text)]
    )
    (target / TOKENIZER_NAME).write_text(backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special,
        "eos_token": special,
        "clean_up_tokenization_spaces": False,
    }
    write_json(target / "tokenizer_config.json", settings)
