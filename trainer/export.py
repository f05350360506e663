"""Trained weights in the layout of transformers: `LlamaForCausalLM`, or Qwen3 where queries are
normed.

The mathematics is the same (rotary positions in the half-split layout, RMSNorm before each block,
SwiGLU), so exporting is renaming; logits agree to rounding. The tokenizer is written so that it
puts the end-of-text token before a text, since every document opened with it in training.
"""

from pathlib import Path

from safetensors.torch import save_file

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import ffn_width, head_width, kv_heads
from interlace.trainer.run_folder import write_json
from interlace.trainer.saved_model import SavedModel

BLOCK_NAMES = {
    "blocks.0.norm": "input_layernorm",
    "blocks.0.mixer.query": "self_attn.q_proj",
    "blocks.0.mixer.key": "self_attn.k_proj",
    "blocks.0.mixer.value": "self_attn.v_proj",
    "blocks.0.mixer.output": "self_attn.o_proj",
    "blocks.0.mixer.query_norm": "self_attn.q_norm",
    "blocks.0.mixer.key_norm": "self_attn.k_norm",
    "blocks.1.norm": "post_attention_layernorm",
    "blocks.1.mixer.gate": "mlp.gate_proj",
    "blocks.1.mixer.up": "mlp.up_proj",
    "blocks.1.mixer.down": "mlp.down_proj",
}

OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def export_hf(saved: SavedModel, run: Path, target: Path) -> str:
    """Write a folder that `transformers` loads; return the name of its class.

    Args:
        saved: The model.
        run: Its run folder, which holds the tokenizer.
        target: Folder to write; must be new or empty.

    Raises:
        ConfigError: The folder is not empty, or the model has blocks that no class there has.
    """
    pattern = saved.config.model.pattern
    if pattern != "AF":
        raise ConfigError(
            [f"model.pattern={pattern}: transformers' Llama is AF repeated; no class fits this one"]
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError([f"--to hf {target}: exists and is not an empty folder; name a new one"])
    target.mkdir(parents=True, exist_ok=True)
    state = {hf_name(name): value.contiguous() for name, value in saved.model.state_dict().items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    architecture = "Qwen3ForCausalLM" if saved.config.model.query_key_norm else "LlamaForCausalLM"
    write_json(target / "config.json", hf_config(saved, architecture))
    end = saved.tokenizer.end_of_text
    write_json(target / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    write_tokenizer(saved, run / TOKENIZER_NAME, target)
    return architecture


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


def hf_name(name: str) -> str:
    """Return transformers' name of one of our parameters."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[rest.removesuffix('.weight')]}.weight"


def hf_config(saved: SavedModel, architecture: str) -> dict[str, object]:
    """Return `config.json`."""
    model: ModelSection = saved.config.model
    end = saved.tokenizer.end_of_text
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": saved.model.embedding.weight.shape[0],
        "hidden_size": model.width,
        "intermediate_size": ffn_width(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": kv_heads(model),
        "head_dim": head_width(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "max_position_embeddings": saved.config.data.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
