"""A trained model from its run folder: weights, shape and tokenizer, without the rest of the
run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import read_weights
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.data.tokenizers import Tokenizer, load_tokenizer
from interlace.trainer.errors import CheckpointError
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import objective_of
from interlace.trainer.run_folder import read_config
from interlace.trainer.sampling import SamplingSettings, generate


@dataclass(frozen=True)
class SavedModel:
    """A model as the newest intact checkpoint of a run has it."""

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


def load_saved_model(run: Path, device: torch.device | None = None) -> SavedModel:
    """Load the newest intact checkpoint of a run folder.

    Raises:
        CheckpointError: The folder is no run, or holds no intact checkpoint.
    """
    config = read_config(run)
    if not (run / TOKENIZER_NAME).is_file():
        raise CheckpointError(f"{run}: has no {TOKENIZER_NAME}; the run has not started training")
    weights, scalars = read_weights(CheckpointStore(run / "checkpoints"))
    with torch.device("meta"):
        # A model may be used where its training's kernels are not.
        shape = config.model.model_copy(update={"attention_backend": "auto"})
        anywhere = config.model_copy(update={"model": shape})
        model = objective_of(config).build(anywhere, scalars.vocabulary_size, torch.float32)
    model.load_state_dict(weights, assign=True)
    model = model.to(device or torch.device("cpu")).eval()
    return SavedModel(model, load_tokenizer(run / TOKENIZER_NAME), config, scalars.progress.step)
