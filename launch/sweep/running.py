"""One trial: the steps of a training run, and what is kept of them.

The steps are those of `interlace.trainer.loop`; checkpoint, pictures and printed lines are left
out, since a trial is over in seconds and its folder goes when its result is there. A trial that
diverges ends early: that is the only reason for which one does. One that merely learns slowly runs
to its end, for a learning rate that decays may yet catch up.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from interlace.launch.sweep.store import Result, Store
from interlace.launch.sweep.trials import code_version, shape_digest
from interlace.trainer.assembly import open_run
from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import NumericsError
from interlace.trainer.loop import finished_steps
from interlace.trainer.observe.metrics import StepRecord
from interlace.trainer.world import World

DIVERGENCE_MARGIN = 0.5
"""Nats per token above the loss of the first step, after warm-up, that count as diverged."""

CLIP_FRACTION = "clip_fraction"
"""What the name of a number about clipping in a step's details begins with."""


class QuietWorld(World):
    """One rank that nobody looks at: it prints, draws and reports nothing."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, reports and decides."""
        return False


def run_trial(store: Store, key: str, recipe: Mapping[str, Any]) -> Result:
    """Run one trial, unless its result is there, and keep the result.

    Args:
        store: Where results are kept.
        key: Digest of the trial.
        recipe: Its tables.

    Raises:
        UserError: It cannot run. Divergence is no error but a result.
    """
    known = store.read(key)
    if known is not None:
        return known
    folder = store.begin(key)
    tables = {**recipe, "run": {**recipe["run"], "dir": str(folder)}}
    try:
        result = measured(validate(tables), key, recipe)
        store.write(result)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measured(config: RunConfig, key: str, recipe: Mapping[str, Any]) -> Result:
    """Train, and return what came of it."""
    wall, processor = time.perf_counter(), time.process_time()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    records: list[StepRecord] = []
    diverged = ""
    try:
        with open_run(config, QuietWorld(device=device)) as run:
            for _ in finished_steps(run):
                records.append(run.record())
                diverged = divergence(records, config.optimizer.warmup_steps)
                if diverged:
                    break
                if run.stop_requested:
                    raise KeyboardInterrupt
    except NumericsError as error:
        diverged = str(error)
    lost = bool(diverged)
    return Result(
        key=key,
        loss=math.inf if lost else final_loss(records),
        train_loss=math.inf if lost else late_mean([record.loss for record in records], 0.05),
        diverged=diverged,
        steps=len(records),
        clip_fraction=late_clipping(records),
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - processor,
        shape=shape_digest(config),
        threads=torch.get_num_threads(),
        device=device.type,
        code=code_version(),
        recipe=dict(recipe),
        curve=curve_of(records),
    )


def divergence(records: Sequence[StepRecord], warmup_steps: int) -> str:
    """Say why the newest step counts as diverged; return nothing if it does not."""
    first, last = records[0].loss, records[-1].loss
    if last is None or not math.isfinite(last):
        return f"the loss of step {records[-1].step} is {last}"
    if first is not None and len(records) > warmup_steps and last > first + DIVERGENCE_MARGIN:
        return (
            f"the loss of step {records[-1].step} is {last:.3f}, that of the first was {first:.3f}"
        )
    held_out = records[-1].val_loss
    if held_out is not None and not math.isfinite(held_out):
        return f"the held-out loss after step {records[-1].step} is {held_out}"
    return ""


def final_loss(records: Sequence[StepRecord]) -> float:
    """Return the held-out loss after the last step; every run ends with a validation."""
    loss = records[-1].val_loss
    assert loss is not None, "a finished run has been validated"
    return loss


def late_mean(values: Sequence[float | None], share: float) -> float:
    """Return the mean over the last share of the values, one of them at least."""
    known = [value for value in values if value is not None]
    return fmean(known[-max(1, round(share * len(known))) :])


def clipping(record: StepRecord) -> float | None:
    """Return the share of coordinates that a step clipped, the mean over tensors where it is told
    by tensor; None if nothing is told.
    """
    if CLIP_FRACTION in record.details:
        return record.details[CLIP_FRACTION]
    shares = [value for name, value in record.details.items() if name.startswith(CLIP_FRACTION)]
    return fmean(shares) if shares else None


def late_clipping(records: Sequence[StepRecord]) -> float | None:
    """Return the mean share of clipped coordinates at the end of a run."""
    shares = [share for record in records if (share := clipping(record)) is not None]
    return late_mean(shares, 0.1) if shares else None


def curve_of(records: Sequence[StepRecord]) -> dict[str, list[float | None]]:
    """Return losses and shares of clipped coordinates by step, as they are kept."""
    curve: dict[str, list[float | None]] = {
        "step": [float(record.step) for record in records],
        "loss": [finite(record.loss) for record in records],
    }
    for name, values in (
        ("val_loss", [finite(record.val_loss) for record in records]),
        (CLIP_FRACTION, [clipping(record) for record in records]),
    ):
        if any(value is not None for value in values):
            curve[name] = values
    return curve


def finite(value: float | None) -> float | None:
    """Return a finite number, None for anything else."""
    return value if value is not None and math.isfinite(value) else None


def last_lines(log: Path, count: int = 5) -> list[str]:
    """Return the end of a log."""
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines() if line.strip()][-count:]


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
