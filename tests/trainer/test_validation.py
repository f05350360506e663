"""The held-out loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
