"""Reads a folder that transformers wrote: its `config.json` becomes a recipe, its tensors ours.

What would change a result and has no equal here is refused, with the key at fault. Rows of the
embedding beyond the tokenizer's vocabulary, which some models have for the sake of round sizes, are
left out: no text reaches them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file

from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.interop.foreign import ForeignSettings
from interlace.trainer.interop.formats import Format, format_of_architecture
from interlace.trainer.models.language_model import LanguageModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
LONGEST_ROW = 2048
"""Most tokens per row that an imported recipe trains with unless it is told otherwise."""


def foreign_config(folder: Path) -> RunConfig:
    """Return a recipe for the model of a folder.

    Raises:
        ConfigError: The model has no equal here; every key at fault is named.
        CheckpointError: A file is missing or broken.
    """
    settings, known = described(folder)
    model = known.section(settings)
    length = min(settings.integer("max_position_embeddings", LONGEST_ROW), LONGEST_ROW)
    settings.check()
    # The usual size of a step, in whole rows.
    rows = max(1, 4096 // length)
    tokenizer = folder / TOKENIZER_NAME
    if not tokenizer.is_file():
        raise CheckpointError(f"{folder}: has no {TOKENIZER_NAME}; save its fast tokenizer there")
    data: dict[str, object] = {
        "tokenizer": str(tokenizer.absolute()),
        "sequence_length": length,
    }
    end = end_of_text(folder, settings)
    if end is not None:
        data["end_of_text"] = end
    train = {"tokens_per_step": rows * length}
    return validate({"model": model, "data": data, "train": train})


def described(folder: Path) -> tuple[ForeignSettings, Format]:
    """Return what a folder says of its model, and the format that knows such models."""
    path = folder / CONFIG_NAME
    values = read_json(path)
    named = values.get("architectures")
    name = str(cast(list[object], named)[0]) if isinstance(named, list) and named else "none"
    known = format_of_architecture(name, path)
    settings = ForeignSettings(path, values)
    settings.demand("quantization_config", None, None, "weights are not quantised here")
    return settings, known


def read_json(path: Path) -> Mapping[str, object]:
    """Return a JSON object.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return cast(Mapping[str, object], found if isinstance(found, dict) else {})


def end_of_text(folder: Path, settings: ForeignSettings) -> str | None:
    """Return the token that ends a text: by its id in `config.json` or `generation_config.json`,
    or by its name in `tokenizer_config.json`; None where none of them says.

    Raises:
        CheckpointError: The tokenizer is broken.
    """
    from tokenizers import Tokenizer as Backend

    path = folder / TOKENIZER_NAME
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
    files = [
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("generation_config.json", "tokenizer_config.json")
    ]
    for values in (settings.values, files[0]):
        number = values.get("eos_token_id")
        if isinstance(number, list) and number:
            number = cast(list[object], number)[0]
        token = backend.id_to_token(number) if isinstance(number, int) else None
        if token is not None:
            return token
    named = files[1].get("eos_token")
    if isinstance(named, dict):
        named = cast(Mapping[str, object], named).get("content")
    return named if isinstance(named, str) else None


def foreign_weights(
    folder: Path, config: RunConfig, tokenizer: Tokenizer
) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a folder's model under our names, fp32 on the CPU.

    Raises:
        ConfigError: A tensor is missing, has another shape or is not known here.
        CheckpointError: A file is missing or broken.
    """
    _, known = described(folder)
    tensors = {
        name: tensor.float()
        for name, tensor in read_shards(folder).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.model.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    ours = known.imported(tensors, config.model)
    size = tokenizer.vocabulary_size
    for name in ("embedding.weight", "head.weight"):
        if name in ours:
            ours[name] = ours[name][:size].contiguous()
    with torch.device("meta"):
        expected = LanguageModel(config.model, size).state_dict()
    check_tensors(folder, ours, expected)
    return ours


def check_tensors(
    folder: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise `ConfigError` naming the first tensor that is missing, differs or is unknown."""
    for name, tensor in expected.items():
        if name not in found:
            raise ConfigError([f"{folder}: holds no tensor for {name}; its files are incomplete"])
        if found[name].shape != tensor.shape:
            raise ConfigError(
                [
                    f"{folder}: its tensor for {name} is {list(found[name].shape)}, and its "
                    f"{CONFIG_NAME} and {TOKENIZER_NAME} ask for {list(tensor.shape)}"
                ]
            )
    strange = sorted(found.keys() - expected.keys())
    if strange:
        raise ConfigError(
            [f"{folder}: has a tensor {strange[0]}, which no block here has, and is refused"]
        )


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder: one file, or those that an index names.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    index = folder / f"{WEIGHTS_NAME}.index.json"
    names = [WEIGHTS_NAME]
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{index}: has no `weight_map` of tensors and their files")
        names = sorted({str(place) for place in cast(Mapping[str, object], places).values()})
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        # Only the folder's own files: an index is not to be trusted with paths.
        file = folder / Path(name).name
        try:
            tensors |= load_file(file)
        except Exception as error:  # safetensors raises an exception type of its own
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    return tensors
