"""Two ranks under muP, whose shards cut through blocks of rows, learn what one learns."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.launch.cli import main

HYBRID = (
    "model.pattern=MF AF",
    "model.layers=1",
    "model.mamba_head_width=16",
    "model.mamba_state_width=8",
)
MUP = ("mup.enabled=true", "mup.base_width=16", "model.kv_heads=2", "mup.base_layers=1")


def numbers(run: Path) -> torch.Tensor:
    """Return the losses of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.long
def test_two_ranks_learn_what_one_learns(
    tiny: Sequence[str], interlace: Any, tmp_path: Path
) -> None:
    clipped = ("optimizer.rule=clipped_sgd", "optimizer.peak_lr=0.5")
    words = (*tiny, "train.steps=8", "train.validate_every_steps=0", *HYBRID, *MUP, *clipped)
    assert main(["train", *words, f"run.dir={tmp_path / 'one'}"]) == 0
    done = interlace("train", *words, f"run.dir={tmp_path / 'two'}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 8
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    assert one[-1] < one[0] - 0.05
