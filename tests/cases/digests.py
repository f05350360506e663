"""Digests of training state, as stored and as loaded."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import TrainingState, open_checkpoint

LIVE_DIGEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
from digests import live_tensors
from tiny_run import digest_of
from interlace.trainer.assembly import assemble
from interlace.trainer.config import load_recipe
from interlace.trainer.world import process_group
with process_group() as world:
    config = load_recipe(sys.argv[1], [f"run.dir={{sys.argv[2]}}", *sys.argv[3:]]).config
    parts, progress, _ = assemble(config, world)
    digest = digest_of(live_tensors(parts.state))
    parts.state.engine.close()
    if world.is_main:
        print("DIGEST", progress.step, digest)
"""


def live_tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return every tensor of a live state as a whole, by canonical name, on every rank, put
    together of what the ranks have of it.
    """
    rank, boxes = state.world.rank, list[Any]()
    for live in state.live():
        part = live.part(live.whole(), rank)
        if part.owned:
            box = (live.name, part.global_shape, part.offset, part.data.detach().cpu().clone())
            boxes.append(box)
    found: dict[str, torch.Tensor] = {}
    for name, shape, offset, data in itertools.chain(*state.world.gather(boxes)):
        whole = found.setdefault(name, torch.empty(shape, dtype=data.dtype))
        ends = [slice(first, first + n) for first, n in zip(offset, data.shape, strict=True)]
        whole[tuple(ends)] = data
    return found


def stored_digest(run: Path, step: int) -> str:
    """Digest of all full tensors of a checkpoint, read from its files."""
    reader = open_checkpoint(CheckpointStore(run / "checkpoints"), step).reader
    digest = hashlib.sha256()
    for name in sorted(reader.index):
        whole = reader.read_whole(name)
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def live_digest(run: Path, ranks: int, tmp_path: Path, *overrides: str) -> tuple[int, str]:
    """Digest of model and optimizer right after loading on so many ranks."""
    script = tmp_path / "digest.py"
    script.write_text(LIVE_DIGEST, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), str(run / "config.toml"), str(run)]
    command += overrides
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("DIGEST")] or [""]
    assert line, done.stdout + done.stderr
    return int(line.split()[1]), line.split()[2]
