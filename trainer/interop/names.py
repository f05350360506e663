"""Names of parameters: ours, `layers.0.blocks.1.mixer.gate.weight`, and those of transformers,
`model.layers.0.mlp.gate_proj.weight`.
"""

from collections.abc import Mapping

OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""What is not inside a layer."""


def renamed(name: str, inside: Mapping[str, str]) -> str:
    """Return transformers' name of one of our parameters; `inside` knows those of a layer."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{inside[rest]}"


def renamed_back(name: str, inside: Mapping[str, str], outer: Mapping[str, str]) -> str:
    """Return our name of one of transformers' parameters, or the name itself where we have none."""
    if name in outer:
        return outer[name]
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in inside:
        return f"layers.{parts[2]}.{inside[parts[3]]}"
    return name
