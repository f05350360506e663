"""Sweeps that take a moment, and runners that pretend to train."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interlace.launch.cli import build_parser, parse
from interlace.launch.sweep.conducting import Ended, Job, State, conduct
from interlace.launch.sweep.records import SECONDS
from interlace.launch.sweep.request import read_request
from interlace.launch.sweep.running import run_trial
from interlace.launch.sweep.store import Result, Store
from interlace.launch.sweep.trials import Space, Trial, make_space

SMALL = (
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_width=64",
    "data.sequence_length=32",
    "train.tokens_per_step=128",
    "train.steps=4",
    "train.validate_every_steps=0",
    "train.validation_tokens=256",
    "optimizer.warmup_steps=1",
)


def words(corpus: Sequence[str], *more: str, lr: str = "2**-8:2**-6") -> list[str]:
    """Return the words of a sweep whose trials take a moment."""
    return ["sweep", "fault-drill", *SMALL, *corpus, "--widths", "16,32", "--lr", lr, *more]


def space_of(corpus: Sequence[str], tmp_path: Path, *more: str) -> Space:
    """Return what such a sweep may try."""
    line = words(corpus, "--store", str(tmp_path / "store"), *more)
    return make_space(read_request(parse(build_parser(), line)), "cpu")


def a_trial(space: Space, **changes: Any) -> Trial:
    """Return one trial of a sweep."""
    values = {"width": 16, "parametrisation": "standard", "settings": (), "seed": 0}
    return Trial(**{**values, "log2_lr": -7.0, **changes})


def result_of(trial: Trial, loss: float, **changes: Any) -> Result:
    """Return a result that nobody has trained."""
    values: dict[str, Any] = {
        "key": f"{hash(trial):x}",
        "loss": loss,
        "train_loss": loss,
        "diverged": "" if math.isfinite(loss) else "the loss of step 3 is inf",
        "steps": 4,
        "clip_fraction": None,
        "wall_seconds": trial.width / 16,
        "cpu_seconds": 1.0,
        "shape": "s",
        "threads": 1,
        "device": "cpu",
        "code": "c",
        "recipe": {},
    }
    return Result(**{**values, **changes})


class Pretended:
    """Runs nothing: losses come from a formula, and what it names crashes."""

    def __init__(self, store: Store, crashing: set[Trial] | None = None) -> None:
        self.store, self.crashing = store, crashing or set()
        self.started: list[Trial] = []
        self.pending: list[Job] = []

    def room(self) -> int:
        return 2 - len(self.pending)

    def start(self, job: Job) -> None:
        assert self.room() > 0, "no more than there is room for"
        self.started.append(job.trial)
        self.pending.append(job)

    def wait(self, seconds: float) -> list[Ended]:
        job = self.pending.pop()
        trial = job.trial
        if trial in self.crashing:
            return [Ended(job, None, "ValueError: broken\n    log: nowhere")]
        octaves = 0.0 if trial.parametrisation == "mup" else math.log2(trial.width / 16)
        loss = 2.5 - 0.1 * math.log2(trial.width) + 0.01 * trial.seed
        loss += 0.02 * (trial.log2_lr + 6 + octaves) ** 2
        result = result_of(trial, loss, key=job.key, recipe=dict(job.recipe), clip_fraction=0.25)
        self.store.write(result)
        return [Ended(job, result)]

    def close(self) -> None: ...


class Inline:
    """Runs trials here and now, one at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.jobs: list[Job] = []

    def room(self) -> int:
        return 1 - len(self.jobs)

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def wait(self, seconds: float) -> list[Ended]:
        job = self.jobs.pop()
        return [Ended(job, run_trial(self.store, job.key, job.recipe))]

    def close(self) -> None: ...


def pretended(space: Space, **crashing: Any) -> tuple[State, Pretended]:
    """Carry out a sweep in pretence."""
    store = Store(space.request.store)
    state, runner = State(space, store), Pretended(store, **crashing)
    conduct(state, runner, lambda state: None)
    return state, runner


def without_seconds(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a sweep's table, less what a clock says."""
    rows = csv.DictReader((folder / "sweep.csv").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key not in SECONDS} for row in rows]
