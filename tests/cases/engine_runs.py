"""Runs one after another in the processes of one group of ranks, under any engine.

Starting ranks and importing takes longer than a run of a dozen steps: a script makes all runs of a
test, and rank 0 leaves what came of them in `shown.json`. This module loads no DeepSpeed; a recipe
that asks for it does.
"""

import contextlib
import io
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from digests import live_tensors
from ranks import run_on_ranks
from tiny_run import config_of, digest_of

from interlace.trainer import assembly
from interlace.trainer.checkpoint import failpoints
from interlace.trainer.checkpoint.failpoints import FailpointHit
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.errors import UserError
from interlace.trainer.loop import train
from interlace.trainer.world import World, process_group

CASES = Path(__file__).resolve().parent

SCRIPT = f"""
import sys
sys.path.insert(0, {str(CASES)!r})
from engine_runs import make_runs
make_runs()
"""

CUTTING = "cutting.json"
"""A file, beside the runs, of settings of DeepSpeed by which ZeRO-3 keeps no weight whole."""

ZERO = "parallel.engine=deepspeed"

WORDS = (
    "fault-drill",
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_width=64",
    "data.sequence_length=32",
    "train.tokens_per_step=384",
    "train.steps=12",
    "train.validate_every_steps=0",
    "train.validation_tokens=64",
    "optimizer.warmup_steps=5",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "observe.log_every_steps=1",
    "observe.sample_tokens=0",
    "watchdog.seconds=0",
)
"""A run of 12 steps of 12 rows."""

Seen = dict[str, Any]
"""What came of a run, as JSON."""


def made(
    runs: Mapping[str, Sequence[str]],
    folder: Path,
    corpus: Sequence[str],
    ranks: int = 2,
) -> dict[str, Seen]:
    """Make runs on some ranks, or go on with them; return what `seen` tells of each.

    Args:
        runs: Words of each, by name, which is that of its folder. The word `at=NAME@N:ACTION` arms
            a failpoint, on rank 0 alone with `on=0`.
        folder: Where their folders are.
        corpus: The words that name the corpus.
        ranks: Number of processes.
    """
    asked = {name: [*WORDS, *corpus, *words] for name, words in runs.items()}
    (folder / CUTTING).write_text(
        '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}', encoding="utf-8"
    )
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    done = run_on_ranks(SCRIPT, folder, ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "shown.json").read_text(encoding="utf-8"))


def make_runs() -> None:
    """Make the runs that `asked.json` in this folder lists, as one of the ranks."""
    # A picture of every run would take longer than the run.
    assembly.leave_pictures = lambda *_: None
    asked = json.loads(Path("asked.json").read_text(encoding="utf-8"))
    with process_group() as world:
        shown = {name: run(world, name, words) for name, words in asked.items()}
        if world.is_main:
            Path("shown.json").write_text(json.dumps(shown), encoding="utf-8")
        world.barrier()


def run(world: World, name: str, words: Sequence[str]) -> Seen:
    """Train, or go on with the run of that name."""
    options = dict(word.split("=", 1) for word in words if word.startswith(("at=", "on=")))
    words = [word for word in words if not word.startswith(("at=", "on="))]
    failpoint = options.get("at", "") if world.rank == int(options.get("on", world.rank)) else ""
    ended, digests = "", list[str]()
    with armed(failpoint), digested(digests), contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            train(config_of(words, Path(name)), world)
        except (FailpointHit, UserError) as error:
            ended = str(error)
    world.barrier()
    return {**seen(Path(name)), "said": said.getvalue(), "ended": ended, "digests": digests}


@contextmanager
def armed(failpoint: str) -> Generator[None]:
    """Arm a failpoint on this rank; none where the setting is empty."""
    failpoints.forget_visits()
    if failpoint:
        os.environ[failpoints.VARIABLE] = failpoint
    try:
        yield
    finally:
        os.environ.pop(failpoints.VARIABLE, None)


@contextmanager
def digested(digests: list[str]) -> Generator[None]:
    """Take the digest of the whole state when it has been built or restored."""
    restore = assembly.restore

    def looked(folder: Any, attempt: int, state: TrainingState, *others: Any) -> Any:
        outcome = restore(folder, attempt, state, *others)
        digests.append(digest_of(live_tensors(state)))
        return outcome

    assembly.restore = looked
    try:
        yield
    finally:
        assembly.restore = restore


def seen(folder: Path) -> Seen:
    """Return losses, gradient norms and skipped steps of a run."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    records = [json.loads(line) for line in lines]
    return {
        "losses": [record["loss"] for record in records],
        "norms": [record["grad_norm"] for record in records],
        "skipped": [record["step"] for record in records if record.get("skipped")],
    }
