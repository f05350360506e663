"""What a continued run may change of its recipe, and what its checkpoints would not fit."""

import pytest

from interlace.trainer.config import load_recipe
from interlace.trainer.run_folder import flatten, is_fixed


@pytest.mark.parametrize(
    "key",
    [
        "model.width",
        "data.sequence_length",
        "run.seed",
        "train.objective",
        "distill.train_only",
        "energy.steps",
        "energy.variant",
        "energy.candidate_table",
        "energy.learn_step_size",
        "energy.replay_rows",
    ],
)
def test_what_a_checkpoint_holds_is_fixed(key: str) -> None:
    assert key in flatten(load_recipe("quickstart").config)
    assert is_fixed(key)


@pytest.mark.parametrize(
    "key", ["train.steps", "optimizer.peak_lr", "data.workers", "model.plugins", "energy.step_size"]
)
def test_what_it_does_not_hold_is_free(key: str) -> None:
    assert key in flatten(load_recipe("quickstart").config)
    assert not is_fixed(key)
