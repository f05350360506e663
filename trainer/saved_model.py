"""A trained model from wherever it lies: weights, shape and tokenizer, without the rest of a run.

Three kinds of folder hold one: a run folder (its newest intact checkpoint counts), a model folder
(`interlace.trainer.model_folder`), and a folder that transformers wrote, with a `config.json` that
names an architecture (`interlace.trainer.interop`). Whatever takes a run takes all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import read_weights
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer, load_tokenizer
from interlace.trainer.errors import CheckpointError
from interlace.trainer.interop.reading import CONFIG_NAME, foreign_config, foreign_weights
from interlace.trainer.model_folder import RECIPE_NAME, WEIGHTS_NAME, read_recipe, read_tensors
from interlace.trainer.models.model import Model
from interlace.trainer.mup.parametrise import built, fold
from interlace.trainer.run_folder import read_config
from interlace.trainer.sampling import SamplingSettings, generate


@dataclass(frozen=True)
class SavedModel:
    """A model as a folder has it.

    Attributes:
        model: In fp32, in evaluation mode.
        tokenizer: Its tokenizer.
        config: Its recipe.
        step: Finished optimizer steps; 0 where nobody knows.
    """

    model: Model
    tokenizer: Tokenizer
    config: RunConfig
    step: int

    def continuation(self, prompt: str, settings: SamplingSettings) -> Iterator[str]:
        """Yield pieces of text that follow `prompt`."""
        ids = generate(
            self.model, self.tokenizer.encode(prompt), self.tokenizer.end_of_text, settings
        )
        return self.tokenizer.stream(ids)


def without_multipliers(saved: SavedModel) -> SavedModel:
    """Return a saved model that computes the same without forward multipliers, which are multiplied
    into its weights: for whoever reads these without knowing of muP.
    """
    return replace(saved, config=fold(saved.model, saved.config))


def saved_config(folder: Path) -> RunConfig:
    """Return the recipe of a saved model, without reading its weights.

    Raises:
        CheckpointError: There is no model.
        ConfigError: It is one that cannot be expressed here.
    """
    if (folder / RECIPE_NAME).is_file():
        return read_recipe(folder)
    if (folder / CONFIG_NAME).is_file():
        return foreign_config(folder)
    if not (folder / "config.toml").is_file():
        raise CheckpointError(
            f"{folder}: holds no model (no config.toml, {RECIPE_NAME} or {CONFIG_NAME} in it); "
            "give a run folder, a model folder or a folder that transformers wrote"
        )
    return read_config(folder)


def load_saved_model(folder: Path, device: torch.device | None = None) -> SavedModel:
    """Load the model of a run folder, a model folder or a folder of transformers.

    Raises:
        CheckpointError: The folder is none of them, or holds no intact weights.
        ConfigError: A folder of transformers whose model cannot be expressed here.
    """
    config = saved_config(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise CheckpointError(
            f"{folder}: has no {TOKENIZER_NAME}; the run has not started training"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME, config.data.end_of_text)
    weights, step = saved_weights(folder, config, tokenizer)
    if "embedding.weight" not in weights:
        raise CheckpointError(f"{folder}: its weights have no embedding.weight, so are no model's")
    with torch.device("meta"):
        # A model may be used where its training's kernels are not.
        shape = config.model.model_copy(update={"attention_backend": "auto"})
        anywhere = config.model_copy(update={"model": shape})
        vocabulary_size = weights["embedding.weight"].shape[0]
        model = built(anywhere, vocabulary_size, torch.float32)
    # Copies: in a mapped file tensors lie at odd addresses, where products round in another order.
    wide = {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in weights.items()
    }
    try:
        model.load_state_dict(wide, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its weights do not fit its recipe: {error}") from error
    model = model.to(device or torch.device("cpu")).eval()
    return SavedModel(model, tokenizer, config, step)


def saved_weights(
    folder: Path, config: RunConfig, tokenizer: Tokenizer
) -> tuple[dict[str, torch.Tensor], int]:
    """Return every parameter and buffer of a saved model on the CPU, and its step."""
    if (folder / RECIPE_NAME).is_file():
        return read_tensors(folder / WEIGHTS_NAME)
    if (folder / CONFIG_NAME).is_file():
        return foreign_weights(folder, config, tokenizer), 0
    weights, scalars = read_weights(CheckpointStore(folder / "checkpoints"))
    return weights, scalars.progress.step
