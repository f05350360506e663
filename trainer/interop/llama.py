"""Attention and SwiGLU as `LlamaForCausalLM`, or Qwen3 where queries are normed.

The mathematics is the same (rotary positions in the half-split layout, RMSNorm before each block,
SwiGLU), so translating is renaming.
"""

import torch

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.interop.foreign import ForeignSettings
from interlace.trainer.interop.formats import Tensors
from interlace.trainer.interop.names import OUTER_NAMES, renamed, renamed_back
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.shapes import ffn_width, head_width, kv_heads

BLOCK_NAMES = {
    "blocks.0.norm.weight": "input_layernorm.weight",
    "blocks.0.mixer.query.weight": "self_attn.q_proj.weight",
    "blocks.0.mixer.key.weight": "self_attn.k_proj.weight",
    "blocks.0.mixer.value.weight": "self_attn.v_proj.weight",
    "blocks.0.mixer.output.weight": "self_attn.o_proj.weight",
    "blocks.0.mixer.query_norm.weight": "self_attn.q_norm.weight",
    "blocks.0.mixer.key_norm.weight": "self_attn.k_norm.weight",
    "blocks.1.norm.weight": "post_attention_layernorm.weight",
    "blocks.1.mixer.gate.weight": "mlp.gate_proj.weight",
    "blocks.1.mixer.up.weight": "mlp.up_proj.weight",
    "blocks.1.mixer.down.weight": "mlp.down_proj.weight",
}


def obstacles(model: ModelSection) -> list[str]:
    """Every stack of AF with rotary positions has its equal."""
    return []


def architecture(model: ModelSection) -> str:
    """Return Qwen3's class where queries and keys are normed, else Llama's."""
    return "Qwen3ForCausalLM" if model.query_key_norm else "LlamaForCausalLM"


def settings(model: ModelSection) -> dict[str, object]:
    """Return widths, heads and the base of positions."""
    return {
        "model_type": architecture(model).removesuffix("ForCausalLM").lower(),
        "hidden_size": model.width,
        "intermediate_size": ffn_width(model),
        "num_hidden_layers": len(layer_patterns(model)),
        "num_attention_heads": model.heads,
        "num_key_value_heads": kv_heads(model),
        "head_dim": head_width(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def exported(tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
    """Rename all parameters."""
    return {renamed(name, BLOCK_NAMES): value for name, value in tensors.items()}


def section(settings: ForeignSettings) -> dict[str, object]:
    """Return the `[model]` table of a Llama or Qwen3."""
    qwen = settings.values.get("model_type") == "qwen3"
    settings.demand("hidden_act", "silu", "silu", "feed-forward blocks are SwiGLU here")
    settings.demand("attention_bias", False, False, "projections have no biases here")
    settings.demand("mlp_bias", False, False, "projections have no biases here")
    settings.demand("use_sliding_window", False, False, "attention sees whole documents here")
    kinds = settings.values.get("layer_types") or []
    if isinstance(kinds, list) and set(kinds) - {"full_attention", "attention"}:
        settings.refuse("layer_types", kinds, "attention sees whole documents here")
    width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    return {
        "pattern": "AF",
        "layers": settings.integer("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": settings.integer("num_key_value_heads", heads),
        "head_width": settings.integer("head_dim", 128 if qwen else width // heads),
        "ffn_width": settings.integer("intermediate_size"),
        "query_key_norm": qwen,
        "tie_embeddings": bool(settings.values.get("tie_word_embeddings", False)),
        "rope_base": settings.rope_base(),
        "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
    }


def imported(tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
    """Rename all parameters; those without a name here keep theirs, and are refused later."""
    own = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    outer = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
    return {renamed_back(name, own, outer): value for name, value in tensors.items()}
