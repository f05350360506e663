"""Any number of ranks reads what any other number wrote, and goes on with the same losses."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import open_checkpoint

LIVE_DIGEST = """
import hashlib, sys
from torch.distributed.tensor import DTensor
from interlace.trainer.assembly import assemble
from interlace.trainer.config import load_recipe
from interlace.trainer.world import process_group
with process_group() as world:
    config = load_recipe(sys.argv[1], [f"run.dir={sys.argv[2]}"]).config
    parts, progress, _ = assemble(config, world)
    digest = hashlib.sha256()
    for name, tensor in sorted(parts.state.tensors().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole = whole.detach()
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.contiguous().numpy().tobytes())
    if world.is_main:
        print("DIGEST", progress.step, digest.hexdigest())
"""


def stored_digest(run: Path, step: int) -> str:
    """Digest of all full tensors of a checkpoint, read from its files."""
    reader = open_checkpoint(CheckpointStore(run / "checkpoints"), step).reader
    digest = hashlib.sha256()
    for name in sorted(reader.index):
        whole = reader.read_whole(name)
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def live_digest(run: Path, ranks: int, tmp_path: Path) -> tuple[int, str]:
    """Digest of model and optimizer right after loading on so many ranks."""
    script = tmp_path / "digest.py"
    script.write_text(LIVE_DIGEST, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), str(run / "config.toml"), str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("DIGEST")] or [""]
    assert line, done.stdout + done.stderr
    return int(line.split()[1]), line.split()[2]


def loss_values(run: Path) -> torch.Tensor:
    """Losses of all steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def test_two_ranks_then_one_then_four_go_on_as_one_straight_run(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert interlace("train", *tiny, f"run.dir={straight}").returncode == 0
    # The run stops where the next number of ranks takes over.
    for ranks, failpoint in ((2, "step.update@14:sigterm"), (1, "step.update@12:sigterm"), (4, "")):
        environment = {"INTERLACE_FAILPOINT": failpoint} if failpoint else {}
        done = interlace("train", *tiny, f"run.dir={moved}", ranks=ranks, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        if failpoint:
            step = CheckpointStore(moved / "checkpoints").committed_steps()[-1]
            stored = stored_digest(moved, step)
            for others in (1, 2, 4):
                assert live_digest(moved, others, tmp_path) == (step, stored)
    assert len(loss_values(moved)) == 40
    torch.testing.assert_close(loss_values(moved), loss_values(straight), rtol=0, atol=1e-5)


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


def test_accumulation_changes_nothing_but_rounding(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    runs = {}
    for rows in (8, 2):
        runs[rows] = tmp_path / f"rows-{rows}"
        words = (f"run.dir={runs[rows]}", f"train.microbatch_rows={rows}", "train.steps=10")
        assert interlace("train", *tiny, *words).returncode == 0
    torch.testing.assert_close(loss_values(runs[2]), loss_values(runs[8]), rtol=0, atol=1e-5)
