"""What a format is: a pair of translations between our blocks and the classes of transformers.

A format renames tensors and settings, both ways, and says in words what it cannot express. The
mathematics must be the same, so logits agree to rounding.
"""

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

import torch

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.foreign import ForeignSettings
from interlace.trainer.models.depth import layer_patterns

Tensors = Mapping[str, torch.Tensor]

MODULES = {
    "llama": "interlace.trainer.interop.llama",
    "granite": "interlace.trainer.interop.granite",
}

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "GraniteMoeHybridForCausalLM": "granite",
}
"""Classes of transformers and the module that knows them."""


class Format(Protocol):
    """The functions of a module that knows some classes of transformers."""

    def obstacles(self, model: ModelSection) -> list[str]:
        """Return what of a model has no equal there, a message each."""
        ...

    def architecture(self, model: ModelSection) -> str:
        """Return the class that a model becomes."""
        ...

    def settings(self, model: ModelSection) -> dict[str, object]:
        """Return the part of `config.json` that describes the blocks."""
        ...

    def exported(self, tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
        """Return our parameters and buffers under the names, and in the shapes, of the class."""
        ...

    def section(self, settings: ForeignSettings) -> dict[str, object]:
        """Return our `[model]` table; what has no equal here is noted as a problem there."""
        ...

    def imported(self, tensors: Tensors, model: ModelSection) -> dict[str, torch.Tensor]:
        """Return the tensors of the class as our parameters and buffers."""
        ...


def format_of_architecture(name: str, where: object) -> Format:
    """Return the format that knows a class.

    Raises:
        ConfigError: None does.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            [f"{where}: architectures={name}: cannot be read here; known are {known}"]
        )
    return load(ARCHITECTURES[name])


def format_for(model: ModelSection) -> Format:
    """Return the format that a model is exported in: Llama's for attention and SwiGLU with rotary
    positions, else the hybrid's.
    """
    plain = set(layer_patterns(model)) == {"AF"} and model.positions == "rope"
    return load("llama" if plain else "granite")


def load(name: str) -> Format:
    """Return the module of a format."""
    return cast(Format, importlib.import_module(MODULES[name]))
