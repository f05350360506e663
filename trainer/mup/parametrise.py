"""Forward multipliers, in and out of a model: plain numbers that its modules hold.

`parametrise` sets them; `fold` multiplies them into weights, for whoever reads a model's weights
without knowing of them: another format, a teacher, a hybrid.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.channel.moe import Router
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.language_model import Block, Layer
from interlace.trainer.models.mixers.attention import Attention
from interlace.trainer.models.model import Model
from interlace.trainer.models.registry import Role, mixer_class
from interlace.trainer.mup.manifest import Manifest, manifest_of
from interlace.trainer.objectives import objective_of


def built(config: RunConfig, vocabulary_size: int, dtype: torch.dtype) -> Model:
    """Return the model of a recipe without values, with its multipliers; called under the meta
    device.
    """
    model = objective_of(config).build(config, vocabulary_size, dtype)
    if config.mup.enabled:
        parametrise(model, manifest_of(config, vocabulary_size))
    return model


def parametrise(model: Model, manifest: Manifest) -> None:
    """Set the forward multipliers of a model."""
    for path, number in manifest.multipliers.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, number)


@torch.no_grad()
def fold(model: Model, config: RunConfig) -> RunConfig:
    """Multiply the forward multipliers of a model into its weights, in place; return its recipe,
    which has none any more.

    Raises:
        ConfigError: A block of a plug-in has no weight that its multiplier can be put into.
    """
    model.norm.weight.mul_(model.norm.multiplier)
    model.norm.multiplier = 1.0
    for word, layer in zip(layer_patterns(config.model), model.layers, strict=True):
        assert isinstance(layer, Layer), "a layer is a word of the pattern"
        for letter, block in zip(word, layer.blocks, strict=True):
            assert isinstance(block, Block), "layers hold blocks"
            roles = mixer_class(letter).roles(config.model)
            check_foldable(letter, block, roles)
            fold_block(block, roles)
    # Nothing is left that rules could be left out of, and recipes say so.
    mup = config.mup.model_copy(update={"enabled": False, "without": []})
    return config.model_copy(update={"mup": mup})


def check_foldable(letter: str, block: Block, roles: Mapping[str, Role]) -> None:
    """Raise `ConfigError` where a block is multiplied and no weight of it can take that over."""
    if block.multiplier == 1.0 or "residual" in roles.values():
        return
    raise ConfigError(
        [
            f"model.pattern: the mixer {letter} has no parameter with the role `residual`, so what "
            f"mup.base_layers multiplies its results with ({block.multiplier:g}) cannot be put "
            "into its weights; declare which of them writes into the residual stream"
        ]
    )


def fold_block(block: Block, roles: Mapping[str, Role]) -> None:
    """Multiply what a block and its mixer are multiplied with into the mixer's weights."""
    mixer = block.mixer
    assert isinstance(mixer, nn.Module), "mixers are modules"
    for name, role in roles.items():
        parameter = mixer.get_parameter(name)
        owner = mixer.get_submodule(name.rpartition(".")[0])
        if role == "residual":
            parameter.mul_(block.multiplier)
        elif role == "readout" and isinstance(owner, Router):
            parameter.mul_(owner.multiplier)
            owner.multiplier = 1.0
    block.multiplier = 1.0
    if isinstance(mixer, Attention):
        usual = 1.0 / math.sqrt(mixer.head_width)
        scaled = mixer.query if mixer.query_norm is None else mixer.query_norm
        scaled.weight.mul_(mixer.score_scale / usual)
        mixer.score_scale = usual
