"""Models that can be compared: from recipes with random weights, or from folders with theirs.

One vocabulary for all. The logits of a prompt are as wide as the vocabulary, so with different ones
memory and time rank vocabularies instead of models; much of what is published about the memory of
long contexts does. One precision for all, for the same reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from interlace.launch.plan_table import expected_vocabulary, stack_in_words
from interlace.trainer.config import load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.mup.parametrise import built
from interlace.trainer.parallel import cast_weights, compute_dtype_of
from interlace.trainer.saved_model import load_saved_model

SIMILAR = 0.05
"""By which share sizes may differ and still pass as equal."""


@dataclass(frozen=True)
class Contender:
    """One model.

    Attributes:
        name: As it was given.
        model: On its device, weights in the compute dtype.
        blocks: Its layers in words.
        parameters: Their number.
        weight_bytes: Bytes of parameters and buffers.
        trained: Whether the weights come from a run.
    """

    name: str
    model: Model
    blocks: str
    parameters: int
    weight_bytes: int
    trained: bool


def contenders(
    names: Sequence[str], overrides: Sequence[str], vocabulary: int | None, device: torch.device
) -> list[Contender]:
    """Return the models that are named, on a device, with one vocabulary and one precision.

    Args:
        names: Recipes, or folders with a model; none twice.
        overrides: Settings that win over those of all recipes.
        vocabulary: Entries for all recipes in place of their own, or None.
        device: Where to put them.

    Raises:
        ConfigError: They cannot be compared.
        CheckpointError: A folder holds no model.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError([f"{name}: is named twice; name it once" for name in twice])
    if all(Path(name).is_dir() for name in names) and overrides:
        reason = "wins over recipes, and only runs are named, which keep their own"
        raise ConfigError([f"{word}: {reason}; leave it out" for word in overrides])
    saved = {name: load_saved_model(Path(name), device) for name in names if Path(name).is_dir()}
    configs = {
        name: saved[name].config if name in saved else load_recipe(name, overrides).config
        for name in names
    }
    entries = {
        name: saved[name].model.embedding.num_embeddings
        if name in saved
        else vocabulary or expected_vocabulary(configs[name])
        for name in names
    }
    check_vocabulary(entries, list(saved), vocabulary)
    dtype = one_precision(configs, device)
    models = {
        name: saved[name].model if name in saved else fresh(configs[name], entries[name], device)
        for name in names
    }
    return [
        contender(name, models[name], configs[name], dtype, trained=name in saved) for name in names
    ]


def check_vocabulary(
    entries: Mapping[str, int], saved: Sequence[str], vocabulary: int | None
) -> None:
    """Raise `ConfigError` unless all models have one vocabulary, as asked if it was."""
    if vocabulary is not None and vocabulary < 2:
        raise ConfigError([f"--vocabulary {vocabulary}: must be 2 or more; type --vocabulary 257"])
    if len(set(entries.values())) <= 1 and vocabulary in {None, *entries.values()}:
        return
    listed = ", ".join(f"{name} has {count:,}" for name, count in entries.items())
    why = "the head's memory and time would be compared instead of the models"
    fixed = {entries[name] for name in saved}
    if len(fixed) > 1 or (vocabulary is not None and fixed - {vocabulary}):
        raise ConfigError(
            [
                f"vocabularies differ ({listed}): {why}, and weights of a run keep theirs; leave "
                f"{' or '.join(saved)} out, or train with one tokenizer"
            ]
        )
    best = fixed.pop() if fixed else max(entries.values())
    raise ConfigError([f"vocabularies differ ({listed}): {why}; type --vocabulary {best}"])


def one_precision(configs: Mapping[str, RunConfig], device: torch.device) -> torch.dtype:
    """Return the compute dtype of all recipes.

    Raises:
        ConfigError: They differ.
    """
    found = {name: compute_dtype_of(config.train, device.type) for name, config in configs.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    listed = ", ".join(f"{name} in {str(dtype)[6:]}" for name, dtype in found.items())
    raise ConfigError(
        [f"precisions differ ({listed}): times would not compare; type train.compute_dtype=float32"]
    )


def fresh(config: RunConfig, vocabulary: int, device: torch.device) -> Model:
    """Return the model of a recipe with the weights it starts from."""
    with torch.device("meta"):
        model = built(config, vocabulary, torch.float32)
    model.to_empty(device=device)
    model.initialise(config.run.seed, manifest_of(config, vocabulary).rescale)
    return model


def contender(
    name: str, model: Model, config: RunConfig, dtype: torch.dtype, *, trained: bool
) -> Contender:
    """Return a model ready to be measured: weights in the compute dtype, nothing recorded."""
    model.compute_dtype = dtype
    cast_weights(model, dtype)
    model.requires_grad_(False).eval()
    tensors = [*model.parameters(), *model.buffers()]
    return Contender(
        name=name,
        model=model,
        blocks=f"{stack_in_words(config)}, width {config.model.width}",
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        trained=trained,
    )


def remarks(found: Sequence[Contender], vocabulary: int | None) -> list[str]:
    """Return what a reader has to know before comparing."""
    notes: list[str] = []
    sizes = [each.parameters for each in found]
    if max(sizes) > (1 + SIMILAR) * min(sizes):
        notes.append(
            "Sizes differ: what follows compares these models, not their architectures at one size."
        )
    if vocabulary is not None:
        notes.append(f"All have {vocabulary:,} entries, as --vocabulary asks.")
    if not any(each.trained for each in found):
        notes.append("Weights are random: times and memory count, what is written does not.")
    return notes
