"""Runs with experts: killed and resumed, recomputed, and on two ranks, they are the same run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import read_weights

EXPERTS = (
    "model.pattern=AE",
    "model.moe_experts=4",
    "model.moe_bias_rate=0.01",
    "train.steps=12",
)


@pytest.fixture(scope="module")
def straight(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run on one rank."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = interlace("train", *tiny, *EXPERTS, f"run.dir={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def biases(run: Path) -> list[torch.Tensor]:
    weights, _ = read_weights(CheckpointStore(run / "checkpoints"))
    return [value for name, value in weights.items() if name.endswith("balance_bias")]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_step_tells_how_even_the_load_was_and_the_bias_has_moved(straight: Path) -> None:
    records = metrics(straight)
    assert len(records) == 12
    for record in records:
        assert 1.0 <= record["expert_load_max"] <= 2.0
        assert 0.0 <= record["expert_load_min"] <= 1.0
        assert 0.0 <= record["experts_idle"] <= 0.5
    found = biases(straight)
    assert len(found) == 2
    assert all(bias.shape == (4,) and bias.dtype == torch.float32 for bias in found)
    assert any(bias.any() for bias in found)
    # Twelve steps of 0.01 at most.
    assert all(bias.abs().max() <= 0.1201 for bias in found)


def test_a_run_that_is_killed_resumed_and_recomputed_is_the_same_run(
    straight: Path,
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    victim = {"INTERLACE_FAILPOINT": "step.backward@7:kill"}
    recomputed = "train.activation_checkpointing=block"
    done = interlace("train", *tiny, *EXPERTS, recomputed, f"run.dir={run}", environment=victim)
    assert done.returncode < 0
    done = interlace("train", "--resume", str(run), "train.activation_checkpointing=selective")
    assert "resumed from the checkpoint of step 5" in done.stdout, done.stdout + done.stderr
    assert losses_of(run) == losses_of(straight)
    for one, other in zip(biases(run), biases(straight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.long
def test_two_ranks_are_one_rank(
    straight: Path, interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = interlace("train", *tiny, *EXPERTS, f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, other in zip(metrics(run), metrics(straight), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["expert_load_max"] == other["expert_load_max"]
    for one, other in zip(biases(run), biases(straight), strict=True):
        assert torch.equal(one, other)
