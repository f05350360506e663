"""A model folder: a model without its run, in three files that need nothing else.

`recipe.toml` is the resolved recipe, valid as one, that trains on from these weights;
`model.safetensors` holds all parameters and buffers in fp32 under our names; `tokenizer.json` turns
text into tokens. `interlace import` and `interlace hybridize` write such folders, and everything
that takes a run folder takes them as well.
"""

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.toml_files import read_tables
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.run_folder import config_text, write_atomically

RECIPE_NAME = "recipe.toml"
WEIGHTS_NAME = "model.safetensors"


def claim_new_folder(said: str, folder: Path) -> None:
    """Create a folder that nothing is in yet.

    Args:
        said: The option and its value, for the message.
        folder: The folder.

    Raises:
        ConfigError: It exists and is not empty, or cannot be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"{said}: exists and is not an empty folder; name a new one"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{said}: cannot be created: {error.strerror}; name a folder that can be"
        raise ConfigError([said]) from error


def write_model_folder(
    weights: dict[str, torch.Tensor],
    config: RunConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    description: str,
    step: int = 0,
) -> None:
    """Write a model into an existing folder.

    Args:
        weights: Every parameter and buffer by our names; floating ones are written in fp32.
        config: The recipe of the model. Paths of this folder in it will be absolute, and its run
            starts from these weights in a folder of its own.
        tokenizer: Its tokenizer.
        folder: Where to write.
        description: One line, for people.
        step: Finished optimizer steps of the run it comes from.
    """
    folder = folder.absolute()
    data = config.data
    if not tokenizer.is_bytes:
        path = str(folder / TOKENIZER_NAME)
        data = data.model_copy(update={"tokenizer": path})
    run = config.run.model_copy(update={"dir": "", "start_from": str(folder)})
    recipe = config.model_copy(update={"run": run, "data": data})
    state = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    # The recipe comes last: a folder that has one is complete.
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "interlace", "step": str(step)})
    tokenizer.save(folder / TOKENIZER_NAME)
    head = f"# {description}\n\n"
    write_atomically(folder / RECIPE_NAME, head + config_text(recipe))


def read_recipe(folder: Path) -> RunConfig:
    """Return the recipe of a model folder; its tokenizer is the folder's own, wherever that has
    been moved.

    Raises:
        CheckpointError: The recipe cannot be read.
    """
    path = folder / RECIPE_NAME
    try:
        tables = read_tables(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    data = tables.get("data")
    if isinstance(data, dict):
        table = cast(dict[str, object], data)
        if table.get("tokenizer", "bytes") not in ("bytes", "bpe"):
            table["tokenizer"] = str((folder / TOKENIZER_NAME).absolute())
    return validate(tables)


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors of a folder's `model.safetensors`, on the CPU, and its step.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            step = int((opened.metadata() or {}).get("step", "0"))
    except Exception as error:  # safetensors raises an exception type of its own
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    return tensors, step
