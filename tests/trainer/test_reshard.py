"""Any number of ranks reads what any other number wrote, and goes on with the same losses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import live_digest, stored_digest

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import open_checkpoint


def loss_values(run: Path) -> torch.Tensor:
    """Losses of all steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.long
def test_two_ranks_then_one_then_four_go_on_as_one_straight_run(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert interlace("train", *tiny, f"run.dir={straight}").returncode == 0
    # The run stops where the next number of ranks takes over.
    for ranks, failpoint, others in (
        (2, "step.update@14:sigterm", 4),
        (1, "step.update@12:sigterm", 2),
        (4, "", 0),
    ):
        environment = {"INTERLACE_FAILPOINT": failpoint} if failpoint else {}
        done = interlace("train", *tiny, f"run.dir={moved}", ranks=ranks, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        if failpoint:
            step = CheckpointStore(moved / "checkpoints").committed_steps()[-1]
            stored = stored_digest(moved, step)
            assert live_digest(moved, others, tmp_path) == (step, stored)
    assert len(loss_values(moved)) == 40
    torch.testing.assert_close(loss_values(moved), loss_values(straight), rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("replicas", [2])
def test_replicated_groups_write_each_slice_once_and_learn_the_same(
    replicas: int, interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    plain, hybrid = tmp_path / "plain", tmp_path / "hybrid"
    assert interlace("train", *tiny, f"run.dir={plain}", "train.steps=10").returncode == 0
    words = ("train", *tiny, f"run.dir={hybrid}", "train.steps=10", f"parallel.replicas={replicas}")
    done = interlace(*words, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    torch.testing.assert_close(loss_values(hybrid), loss_values(plain), rtol=0, atol=1e-5)
    reader = open_checkpoint(CheckpointStore(hybrid / "checkpoints"), 10).reader
    files = {part.file for entry in reader.index.values() for part in entry.slices}
    assert files == {"rank-00000-of-00004.safetensors", "rank-00001-of-00004.safetensors"}


@pytest.mark.long
def test_accumulation_changes_nothing_but_rounding(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    runs = {}
    for rows in (8, 2):
        runs[rows] = tmp_path / f"rows-{rows}"
        words = (f"run.dir={runs[rows]}", f"train.microbatch_rows={rows}", "train.steps=10")
        assert interlace("train", *tiny, *words).returncode == 0
    torch.testing.assert_close(loss_values(runs[2]), loss_values(runs[8]), rtol=0, atol=1e-5)
