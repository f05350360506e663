"""Hybrids of attention, Mamba-2 and experts as `GraniteMoeHybridForCausalLM`.

A layer there is a sequence mixer and a feed-forward block: our words AF, MF, AE and ME. Experts are
in every layer or in none; the feed-forward block, or the shared experts, are its `shared_mlp`. Gate
and up lie in one matrix, gate first. The layout of Mamba-2 is ours. Its multipliers are one, and
attention is scaled as it is here. Steps are not limited: `time_step_limit`, which its decoding does
not heed, is not written, so that decoding a text gives what reading it whole does. (Seen in
transformers 5.24: a stack without any attention is read whole, but its cache cannot decode it.)
"""

import math
from typing import cast

import torch

from interlace.kernels.ssd.api import CHUNKS
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.interop.foreign import ForeignSettings
from interlace.trainer.interop.formats import Tensors
from interlace.trainer.interop.names import OUTER_NAMES, renamed, renamed_back
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.shapes import (
    expert_width,
    ffn_width,
    head_width,
    kv_heads,
    mamba_heads,
)

WORDS = ("AF", "MF", "AE", "ME")

BLOCK_NAMES = {
    "blocks.0.norm.weight": "input_layernorm.weight",
    "blocks.0.mixer.query.weight": "self_attn.q_proj.weight",
    "blocks.0.mixer.key.weight": "self_attn.k_proj.weight",
    "blocks.0.mixer.value.weight": "self_attn.v_proj.weight",
    "blocks.0.mixer.output.weight": "self_attn.o_proj.weight",
    "blocks.0.mixer.in_proj.weight": "mamba.in_proj.weight",
    "blocks.0.mixer.conv.weight": "mamba.conv1d.weight",
    "blocks.0.mixer.conv.bias": "mamba.conv1d.bias",
    "blocks.0.mixer.dynamics.A_log": "mamba.A_log",
    "blocks.0.mixer.dynamics.dt_bias": "mamba.dt_bias",
    "blocks.0.mixer.dynamics.D": "mamba.D",
    "blocks.0.mixer.norm.weight": "mamba.norm.weight",
    "blocks.0.mixer.out_proj.weight": "mamba.out_proj.weight",
    "blocks.1.norm.weight": "post_attention_layernorm.weight",
    "blocks.1.mixer.router.weight": "block_sparse_moe.router.layer.weight",
    "blocks.1.mixer.experts.down": "block_sparse_moe.output_linear.weight",
    "blocks.1.mixer.shared.down.weight": "shared_mlp.output_linear.weight",
    "blocks.1.mixer.down.weight": "shared_mlp.output_linear.weight",
}
"""What is one tensor on both sides."""

FUSED_NAMES = {
    "blocks.1.mixer.experts.gate": "block_sparse_moe.input_linear.weight",
    "blocks.1.mixer.shared.gate.weight": "shared_mlp.input_linear.weight",
    "blocks.1.mixer.gate.weight": "shared_mlp.input_linear.weight",
}
"""Gates, with which up lies in one tensor there."""

CONVOLUTION = "mamba.conv1d.weight"


def obstacles(model: ModelSection) -> list[str]:
    """Return every setting that has no equal there."""
    words = list(dict.fromkeys(layer_patterns(model)))
    pattern, letters = f"model.pattern={model.pattern}", "".join(words)
    problems: list[str] = []
    strange = [word for word in words if word not in WORDS]
    if strange:
        problems.append(
            f"{pattern}: its layer {strange[0]} is in no class of transformers that is known here; "
            f"layers that can be exported are {', '.join(WORDS)}"
        )
    elif "F" in letters and "E" in letters:
        problems.append(
            f"{pattern}: GraniteMoeHybrid has experts in every layer or in none; a mix of F and E "
            "cannot be exported"
        )
    if "A" in letters and model.query_key_norm:
        problems.append("model.query_key_norm=true: GraniteMoeHybrid does not norm queries")
    if "M" in letters and not float(model.mamba_expand).is_integer():
        problems.append(
            f"model.mamba_expand={model.mamba_expand}: GraniteMoeHybrid takes whole multiples of "
            "the width only"
        )
    if "E" in letters:
        problems += expert_obstacles(model)
    return problems


def expert_obstacles(model: ModelSection) -> list[str]:
    """Return the settings of experts that have no equal there."""
    problems: list[str] = []
    if model.moe_router != "softmax":
        problems.append(
            f"model.moe_router={model.moe_router}: GraniteMoeHybrid takes the softmax over the "
            "chosen logits"
        )
    if not model.moe_shared_experts:
        problems.append("model.moe_shared_experts=0: GraniteMoeHybrid always has a shared expert")
    if model.moe_bias_rate:
        problems.append(
            f"model.moe_bias_rate={model.moe_bias_rate}: GraniteMoeHybrid has no bias on the "
            "choice of experts"
        )
    return problems


def architecture(model: ModelSection) -> str:
    """Return the one class."""
    return "GraniteMoeHybridForCausalLM"


def settings(model: ModelSection) -> dict[str, object]:
    """Return widths, kinds of layers, and what experts and Mamba-2 need."""
    words = layer_patterns(model)
    letters = "".join(words)
    experts, mamba = "E" in letters, "M" in letters
    hidden = expert_width(model)
    kinds = {"A": "full_attention", "M": "linear_attention"}
    return {
        "model_type": "granitemoehybrid",
        "hidden_size": model.width,
        "intermediate_size": hidden if experts else ffn_width(model),
        "shared_intermediate_size": (
            hidden * model.moe_shared_experts if experts else ffn_width(model)
        ),
        "num_local_experts": model.moe_experts if experts else 0,
        "num_experts_per_tok": model.moe_top_k if experts else 1,
        "num_hidden_layers": len(words),
        "layer_types": [kinds[word[0]] for word in words],
        "num_attention_heads": model.heads,
        "num_key_value_heads": kv_heads(model),
        "head_dim": head_width(model),
        "attention_multiplier": 1 / math.sqrt(head_width(model)),
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "position_embedding_type": "rope" if model.positions == "rope" else None,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        # Where no layer is Mamba-2 these are not used, but must agree with each other.
        "mamba_expand": int(model.mamba_expand) if mamba else 1,
        "mamba_n_heads": mamba_heads(model) if mamba else 1,
        "mamba_d_head": model.mamba_head_width if mamba else model.width,
        "mamba_n_groups": model.mamba_groups if mamba else 1,
        "mamba_d_state": model.mamba_state_width,
        "mamba_d_conv": model.mamba_conv_width,
        "mamba_chunk_size": CHUNKS["chunked"],
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def exported(tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
    """Rename all parameters and put gate and up together."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        rest = name.split(".", 2)[-1]
        if rest in FUSED_NAMES:
            # (f, D), or (E, f, D) for experts: rows of the result are gate, then up.
            up = tensors[".up".join(name.rsplit(".gate", 1))]
            found[renamed(name, FUSED_NAMES)] = torch.cat([value, up], dim=-2)
        elif ".up" not in rest:
            theirs = renamed(name, BLOCK_NAMES)
            found[theirs] = value.unsqueeze(1) if theirs.endswith(CONVOLUTION) else value
    return found


def section(settings: ForeignSettings) -> dict[str, object]:
    """Return the `[model]` table of a hybrid."""
    refuse_what_differs(settings)
    width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    each = settings.integer("head_dim", max(1, width // heads))
    scale = settings.number("attention_multiplier", 1.0)
    if not math.isclose(scale, 1 / math.sqrt(each), rel_tol=1e-6):
        settings.refuse("attention_multiplier", scale, "scores are divided by the root of the head")
    experts = settings.integer("num_local_experts", 8, least=0)
    kinds = layer_kinds(settings, "E" if experts else "F")
    return {
        "pattern": " ".join(kinds),
        "layers": 1,
        "width": width,
        "heads": heads,
        "kv_heads": settings.integer("num_key_value_heads", heads),
        "head_width": each,
        "positions": "rope" if settings.values.get("position_embedding_type") == "rope" else "none",
        "rope_base": settings.rope_base(),
        "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(settings.values.get("tie_word_embeddings", False)),
        **feed_forward_section(settings, experts),
        **(mamba_section(settings, width) if any("M" in kind for kind in kinds) else {}),
    }


def refuse_what_differs(settings: ForeignSettings) -> None:
    """Note every setting that changes the mathematics and has no equal here."""
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        settings.demand(key, 1.0, 1.0, "nothing is multiplied there here")
    settings.demand("hidden_act", "silu", "silu", "feed-forward blocks are SwiGLU here")
    settings.demand("attention_bias", False, False, "projections have no biases here")
    settings.demand("mamba_proj_bias", False, False, "projections have no biases here")
    settings.demand("mamba_conv_bias", True, True, "the convolution has a bias here")
    limit = settings.values.get("time_step_limit")
    endless = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
    if limit not in endless:
        settings.refuse("time_step_limit", limit, "steps are not limited here")
    kind = settings.values.get("position_embedding_type")
    if kind not in {None, "rope", "nope"}:
        settings.refuse("position_embedding_type", kind, "positions are rotary or none here")


def layer_kinds(settings: ForeignSettings, behind: str) -> list[str]:
    """Return the word of every layer; `behind` is the letter of the feed-forward block."""
    named = settings.values.get("layer_types") or settings.values.get("layers_block_type")
    count = settings.integer("num_hidden_layers")
    kinds = cast(list[object], named) if isinstance(named, list) else ["mamba"] * count
    letters = {"full_attention": "A", "attention": "A", "linear_attention": "M", "mamba": "M"}
    strange = [kind for kind in kinds if kind not in letters]
    if strange:
        settings.refuse("layer_types", strange[0], "layers are attention or Mamba-2 here")
    return [letters.get(str(kind), "A") + behind for kind in kinds]


def feed_forward_section(settings: ForeignSettings, experts: int) -> dict[str, object]:
    """Return the settings of the feed-forward blocks or experts."""
    shared = settings.integer("shared_intermediate_size", 1024, least=0)
    if not experts:
        return {"ffn_width": shared}
    hidden = settings.integer("intermediate_size")
    if shared % hidden:
        settings.refuse(
            "shared_intermediate_size", shared, f"it is no multiple of intermediate_size={hidden}"
        )
    return {
        "moe_experts": experts,
        "moe_top_k": settings.integer("num_experts_per_tok", 2),
        "moe_expert_width": hidden,
        "moe_shared_experts": shared // hidden,
        "moe_router": "softmax",
    }


def mamba_section(settings: ForeignSettings, width: int) -> dict[str, object]:
    """Return the settings of the Mamba-2 blocks."""
    expand, heads = settings.integer("mamba_expand", 2), settings.integer("mamba_n_heads", 128)
    automatic = settings.values.get("mamba_d_head", "auto") == "auto"
    each = expand * width // heads if automatic else settings.integer("mamba_d_head")
    return {
        "mamba_expand": float(expand),
        "mamba_head_width": each,
        "mamba_state_width": settings.integer("mamba_d_state", 256),
        "mamba_groups": settings.integer("mamba_n_groups", 1),
        "mamba_conv_width": settings.integer("mamba_d_conv", 4),
    }


def imported(tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
    """Rename all tensors and take gate and up apart; those without a name here keep theirs."""
    experts = "E" in "".join(layer_patterns(model))
    other = "blocks.1.mixer.down.weight" if experts else "blocks.1.mixer.shared.down.weight"
    unused = "blocks.1.mixer.gate.weight" if experts else "blocks.1.mixer.shared.gate.weight"
    own = {theirs: ours for ours, theirs in BLOCK_NAMES.items() if ours != other}
    fused = {theirs: ours for ours, theirs in FUSED_NAMES.items() if ours != unused}
    outer = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        gate = renamed_back(name, fused, {})
        if gate != name:
            up = ".up".join(gate.rsplit(".gate", 1))
            found[gate], found[up] = (part.contiguous() for part in value.chunk(2, dim=-2))
        else:
            ours = renamed_back(name, own, outer)
            found[ours] = value.squeeze(1) if name.endswith(CONVOLUTION) else value
    return found
