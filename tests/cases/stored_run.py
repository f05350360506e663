"""A run that was stored with the repository, so that later code has to go on with what earlier code
saved.

`tests/faults/stored/format-1` holds its checkpoint of step 4 and what it computed afterwards. To
store a run of another format beside it:

    python tests/cases/stored_run.py NEW_FOLDER
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tiny_run import digest_of, state_of, train_here

from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.checkpoint.state import load_newest

TEXT = "".join(f"{n} green bottles standing on a wall, {n * n}\n" for n in range(400))

# Relative paths: the digest of a corpus holds them.
WORDS = (
    "fault-drill",
    "model.width=8",
    "model.heads=1",
    "model.kv_heads=1",
    "model.ffn_width=16",
    "model.layers=2",
    "data.source=text.txt",
    "data.prepared_dir=prepared",
    "data.sequence_length=32",
    "train.tokens_per_step=256",
    "train.steps=8",
    "train.validate_every_steps=0",
    "train.validation_tokens=64",
    "train.compute_dtype=float32",
    "optimizer.warmup_steps=3",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "observe.sample_tokens=0",
)


def losses_after(run: Path) -> list[float]:
    """Return the losses of the steps behind the stored one."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [loss for step, loss in map(step_and_loss, lines) if step > 4]


def step_and_loss(line: str) -> tuple[int, float]:
    record = json.loads(line)
    return int(record["step"]), float(record["loss"])


def loaded_digest(run: Path) -> str:
    """Return the digest of the state that the newest checkpoint of a run gives a fresh model."""
    state = state_of(WORDS, run.parent / "fresh")
    load_newest(CheckpointStore(run / "checkpoints"), state)
    return digest_of(state.tensors())


def store(target: Path) -> None:
    """Make the run and store what is needed of it."""
    target = target.absolute()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        run = Path(work) / "run"
        train_here(WORDS, run)
        committed = run / "checkpoints" / "committed"
        shutil.rmtree(committed / "00000008")
        shutil.copytree(committed, target / "checkpoints" / "committed")
        for name in ("config.toml", "environment.json"):
            shutil.copy(run / name, target / name)
        after = {
            "digest": loaded_digest(run),
            "losses": [loss.hex() for loss in losses_after(run)],
        }
        (target / "after.json").write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
