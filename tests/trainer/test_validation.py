"""The held-out loss, and what else makes many forward passes between two marks of a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.run import forwards_beat
from interlace.trainer.validation import validate
from interlace.trainer.world import World


def test_every_micro_batch_of_a_long_validation_is_a_sign_of_life() -> None:
    told: list[str] = []
    sums = {"a": 4.0, "b": 2.0}

    def loss_of(model: Any, batch: str) -> torch.Tensor:
        told.append(batch)
        return torch.tensor(sums[batch])

    model: Any = torch.nn.Identity()
    objective: Any = SimpleNamespace(held_out_nll=loss_of)
    batches: Any = SimpleNamespace(
        of_validation=lambda: iter([("a", 1), ("b", 3)]), validation_bytes_per_token=1.0
    )
    measured = validate(model, objective, batches, World(), lambda: told.append("beat"))
    assert told == ["beat", "a", "beat", "b"]
    assert measured.loss == pytest.approx((4.0 + 3 * 2.0) / 4)


def test_forward_passes_of_a_diagnostic_are_signs_of_life_and_no_others_are() -> None:
    model = LanguageModel(ModelSection(width=32, heads=4, kv_heads=2, layers=2), 40)
    heartbeat = Heartbeat()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with forwards_beat(model, heartbeat):
        for _ in range(3):
            model(tokens, tokens)
    model(tokens, tokens)
    assert heartbeat.pulse.beats == 3
    assert heartbeat.pulse.marks == 0
