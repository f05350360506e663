"""Writes a folder that transformers loads: weights, `config.json` and tokenizer.

The tokenizer is written so that it puts the end-of-text token before a text, since every document
opened with it in training.
"""

from pathlib import Path

from safetensors.torch import save_file

from interlace.trainer.data.prepare import TOKENIZER_NAME
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.formats import format_for
from interlace.trainer.interop.reading import CONFIG_NAME, WEIGHTS_NAME
from interlace.trainer.model_folder import claim_new_folder
from interlace.trainer.run_folder import write_json
from interlace.trainer.saved_model import SavedModel


def export_hf(saved: SavedModel, source: Path, target: Path) -> str:
    """Write a folder that `transformers` loads; return the name of its class.

    Args:
        saved: The model.
        source: Its folder, which holds the tokenizer.
        target: Folder to write; must be new or empty.

    Raises:
        ConfigError: The folder is not empty, or the model has no equal there.
    """
    model = saved.config.model
    if saved.config.train.objective == "energy":
        raise ConfigError(
            ["train.objective=energy: transformers has no class for energy-based models"]
        )
    known = format_for(model)
    if problems := known.obstacles(model):
        raise ConfigError(problems)
    claim_new_folder(f"--to hf {target}", target)
    tensors = known.exported(saved.model.state_dict(), model)
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
    architecture, end = known.architecture(model), saved.tokenizer.end_of_text
    about: dict[str, object] = {
        "architectures": [architecture],
        **known.settings(model),
        "vocab_size": saved.model.embedding.weight.shape[0],
        "max_position_embeddings": saved.config.data.sequence_length,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    write_json(target / CONFIG_NAME, about)
    write_json(target / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    write_tokenizer(saved, source / TOKENIZER_NAME, target)
    return architecture


def write_tokenizer(saved: SavedModel, source: Path, target: Path) -> None:
    """Write the tokenizer so that texts open with the end-of-text token, as in training."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(source))
    special = backend.id_to_token(saved.tokenizer.end_of_text)
    backend.post_processor = TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, saved.tokenizer.end_of_text)]
    )
    (target / TOKENIZER_NAME).write_text(backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special,
        "eos_token": special,
        "clean_up_tokenization_spaces": False,
    }
    write_json(target / "tokenizer_config.json", settings)
