"""Lets a new run start from saved weights: `run.start_from` names their folder.

Only weights are taken over, not the optimizer's state nor the position in the corpus. Every tensor
must have the shape it has in the recipe, and the tokenizers must be the same, since rows of the
embedding are tokens. So must be the numbers that modules multiply with under muP: the same weights
with other multipliers are another model. Every rank reads the whole model into host memory for a
moment and keeps its part.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from interlace.trainer.config.problems import show
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.tokenizers import Tokenizer
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model, fill
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.saved_model import SavedModel, load_saved_model


@torch.no_grad()
def start_from(model: Model, config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Fill a model, which may be sharded, with the weights that its recipe starts from.

    Args:
        model: The model, with its fresh values.
        config: The recipe.
        tokenizer: Of the prepared corpus.

    Returns:
        A note for a person, or None where the recipe starts afresh.

    Raises:
        ConfigError: Tokenizer, shapes or forward multipliers differ; the message names the first
            tensor or module that does.
    """
    if not config.run.start_from:
        return None
    saved = load_saved_model(folder_named("run.start_from", config.run.start_from))
    check_tokenizers(config, saved.tokenizer, tokenizer)
    weights = saved.model.state_dict()
    own = model.state_dict()
    check_shapes(config, weights, own)
    check_multipliers(config, saved, model)
    for name, tensor in own.items():
        fill(tensor, weights[name])
    return f"weights of {config.run.start_from} (step {saved.step})"


def folder_named(setting: str, value: str) -> Path:
    """Return the folder that a setting names.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            [
                f"{setting}={value}: there is no such folder (looked at {folder.absolute()}); type "
                "the path of a run folder, a model folder or a folder that transformers wrote"
            ]
        )
    return folder


def check_tokenizers(config: RunConfig, saved: Tokenizer, corpus: Tokenizer) -> None:
    """Raise `ConfigError` unless the weights know the corpus's tokens by the same numbers."""
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (corpus, saved))
    if ours == theirs and saved.end_of_text == corpus.end_of_text:
        return
    path = Path(config.run.start_from).absolute() / "tokenizer.json"
    raise ConfigError(
        [
            f"data.tokenizer={config.data.tokenizer}: is not the tokenizer of "
            f"run.start_from={config.run.start_from} ({len(ours)} and {len(theirs)} tokens, or "
            f"other ones), so its embedding means nothing here; type data.tokenizer={path}"
        ]
    )


def check_shapes(
    config: RunConfig, saved: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]
) -> None:
    """Raise `ConfigError` naming the first tensor that is missing, differs or is left over."""
    where = f"run.start_from={config.run.start_from}"
    remedy = "type the [model] settings of that model"
    for name, tensor in model.items():
        if name not in saved:
            raise ConfigError([f"{where}: has no {name}, which this recipe's model has; {remedy}"])
        there, here = list(saved[name].shape), list(tensor.shape)
        if there != here:
            raise ConfigError(
                [f"{where}: its {name} is {there}, and this recipe's {here}; {remedy}"]
            )
    left = [name for name in saved if name not in model]
    if left:
        raise ConfigError([f"{where}: has {left[0]}, which this recipe's model has not; {remedy}"])


def check_multipliers(config: RunConfig, saved: SavedModel, model: Model) -> None:
    """Raise `ConfigError` naming the first module that multiplies with another number than the
    weights were trained with.
    """
    entries = model.embedding.weight.shape[0]
    recipes = (saved.config, config)
    paths = [path for recipe in recipes for path in manifest_of(recipe, entries).multipliers]
    for path in dict.fromkeys(paths):
        owner, _, name = path.rpartition(".")
        there, here = (getattr(each.get_submodule(owner), name) for each in (saved.model, model))
        if not math.isclose(there, here, rel_tol=1e-12):
            raise ConfigError(
                [
                    f"run.start_from={config.run.start_from}: was trained with {path}={there:g}, "
                    f"and this recipe has {here:g}, so the same weights would be another model; "
                    f"type {remedy_of(saved.config, config)}"
                ]
            )


def remedy_of(saved: RunConfig, config: RunConfig) -> str:
    """Return the settings under `[mup]` that saved weights were trained with, where they differ."""
    if not saved.mup.enabled:
        return "mup.enabled=false"
    there, here = saved.mup.model_dump(), config.mup.model_dump()
    kept = ["enabled", "base_width", "base_layers", "grows", "without"]
    differ = {key: there[key] for key in kept if there[key] != here[key]}
    typed = [f"mup.{key}={spelled(value)}" for key, value in differ.items()]
    return " ".join(typed) or "the [model] settings of that model"


def spelled(value: object) -> str:
    """Return a value as an override has it."""
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, list) else show(value)
