"""transformers computes the same logits from what is exported, and what it writes is read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import (
    CLASSES,
    LENGTHS,
    SHAPES,
    TEXT,
    load_in_transformers,
    saved,
    shape_of,
    tokens_of,
)

from interlace.trainer.data.tokenizers import train_bpe
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.saved_model import SavedModel, load_saved_model

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Exported:
    """All shapes: ours, their folders, what transformers told, and what it wrote."""

    models: Mapping[str, SavedModel]
    folders: Path
    told: Mapping[str, Any]
    logits: Mapping[str, torch.Tensor]
    rewritten: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("exported")
    bpe = train_bpe(iter([TEXT * 20]), 270)
    models: dict[str, SavedModel] = {}
    for name in SHAPES:
        run = root / f"run of {name}"
        models[name] = saved(shape_of(name), run, bpe if name == "grouped" else None)
        export_hf(models[name], run, root / name)
    told, logits = load_in_transformers([root / name for name in SHAPES], root / "rewritten")
    return Exported(models, root, told, logits, root / "rewritten")


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits_whole_and_token_by_token(
    name: str, exported: Exported
) -> None:
    model, found = exported.models[name].model, exported.logits
    with torch.no_grad():
        expected = model.logits(tokens_of(LENGTHS[-1]))
        caches = model.new_caches(1, LENGTHS[-1])
        steps = [model.logits(token[None], caches) for token in tokens_of(LENGTHS[-1]).unbind(1)]
    assert float(expected.abs().max()) > 1
    for length in LENGTHS:
        torch.testing.assert_close(found[f"{name}/{length}"], expected[:, :length], **TOLERANCE)
    torch.testing.assert_close(found[f"{name}/steps"], expected, **TOLERANCE)
    torch.testing.assert_close(torch.cat(steps, 1), expected, **TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_texts_as_training_did(name: str, exported: Exported) -> None:
    ours = exported.models[name]
    ids = [ours.tokenizer.end_of_text, *ours.tokenizer.encode(TEXT)]
    assert exported.told[name] == {
        "class": f"{CLASSES[name]}ForCausalLM",
        "ids": ids,
        "text": TEXT,
        "end": ours.tokenizer.end_of_text,
    }
    with torch.no_grad():
        expected = ours.model.logits(torch.tensor([ids]))
    torch.testing.assert_close(exported.logits[f"{name}/text"], expected, **TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("writer", ["ours", "transformers"])
def test_what_was_exported_is_read_back_to_the_last_bit(
    writer: str, name: str, exported: Exported
) -> None:
    ours = exported.models[name]
    folder = (exported.folders if writer == "ours" else exported.rewritten) / name
    again = load_saved_model(folder)
    weights, found = ours.model.state_dict(), again.model.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[key], found[key]) for key in weights)
    assert again.tokenizer.end_of_text == ours.tokenizer.end_of_text
    assert again.tokenizer.encode(TEXT) == ours.tokenizer.encode(TEXT)
    assert again.config.data.sequence_length == ours.config.data.sequence_length
    tokens = tokens_of(20)
    with torch.no_grad():
        assert torch.equal(again.model.logits(tokens), ours.model.logits(tokens))
