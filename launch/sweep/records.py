"""What a sweep leaves in its folder: `sweep.json`, `sweep.csv`, and a board for TensorBoard."""

import csv
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from interlace.launch.output_files import finite
from interlace.launch.sweep.conducting import State
from interlace.launch.sweep.judging import Judged, against_standard
from interlace.launch.sweep.trials import Trial
from interlace.trainer.mup.transfer import Transfer, Valley
from interlace.trainer.run_folder import write_atomically, write_json

COLUMNS = ("parametrisation", "width", "log2_lr", "lr", "seed")
MEASURED = ("loss", "train_loss", "diverged", "steps", "clip_fraction")
SECONDS = ("wall_seconds", "cpu_seconds")


def settings_of(trial: Trial) -> dict[str, str]:
    """Return the further settings of a trial by key."""
    words = [word.partition("=") for word in trial.settings]
    return {key: value for key, _, value in words}


def trial_rows(state: State) -> list[dict[str, Any]]:
    """Return one row for every finished trial, in the order of their cost."""
    rows: list[dict[str, Any]] = []
    for trial in sorted(state.results):
        result = state.results[trial]
        row: dict[str, Any] = {name: getattr(trial, name) for name in COLUMNS}
        row |= settings_of(trial)
        row |= {name: getattr(result, name) for name in (*MEASURED, *SECONDS)}
        rows.append({**row, "diverged": bool(result.diverged), "key": result.key})
    return rows


def verdict_document(transfer: Transfer) -> dict[str, Any]:
    """Return a verdict in numbers."""
    return {
        **asdict(transfer),
        "regrets": [asdict(each) | {"passes": each.passes} for each in transfer.regrets],
        "bracketed": transfer.bracketed,
        "drift_passes": transfer.drift_passes,
        "regret_passes": transfer.regret_passes,
        "is_control": transfer.is_control,
    }


def valley_document(valley: Valley) -> dict[str, Any]:
    """Return the points of one width."""
    points = [
        {
            "log2_lr": rate,
            "mean": mean,
            "losses": valley.losses[rate],
            "clip_fraction": valley.clip_fractions.get(rate),
        }
        for rate, mean in valley.means.items()
    ]
    return {"width": valley.width, "points": points}


def sweep_document(state: State, verdicts: Sequence[Judged]) -> dict[str, Any]:
    """Return everything that a sweep found, as JSON has it."""
    space, request = state.space, state.space.request
    document = {
        "recipe": request.recipe,
        "overrides": request.overrides,
        "widths": request.widths,
        "base_width": space.base_width,
        "log2_lr": request.ladder.grid,
        "seeds": space.seeds,
        "code": space.code,
        "device": space.device,
        "families": [
            {
                "parametrisation": each.family.parametrisation,
                "settings": each.family.settings,
                "passes": each.passes,
                "verdict": each.verdict,
                "transfer": verdict_document(each.transfer) if each.transfer else None,
                "valleys": [valley_document(valley) for valley in each.valleys],
            }
            for each in verdicts
        ],
        "above_standard": [
            {"settings": each.family.settings, "nats": above}
            for each, above in against_standard(verdicts)
        ],
        "trials": trial_rows(state),
        "crashed": [
            asdict(trial) | {"problem": problem} for trial, problem in state.failures.items()
        ],
    }
    return finite(document)


def csv_text(state: State) -> str:
    """Return the rows of all finished trials as comma-separated values."""
    rows = trial_rows(state)
    extra = list(dict.fromkeys(key for trial in state.results for key in settings_of(trial)))
    names = [*COLUMNS, *extra, *MEASURED, *SECONDS, "key"]
    text = StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_records(state: State, verdicts: Sequence[Judged], folder: Path) -> dict[str, Any]:
    """Write table and verdict; return the document."""
    folder.mkdir(parents=True, exist_ok=True)
    document = sweep_document(state, verdicts)
    write_json(folder / "sweep.json", document)
    write_atomically(folder / "sweep.csv", csv_text(state))
    write_board(state, folder / "tensorboard")
    return document


def write_board(state: State, folder: Path) -> None:
    """Write hyperparameters and losses of every trial for TensorBoard's HParams, anew each time."""
    from torch.utils.tensorboard.writer import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    board = SummaryWriter(str(folder))
    for trial in sorted(state.results):
        result = state.results[trial]
        words: dict[str, Any] = {name: getattr(trial, name) for name in COLUMNS}
        metrics = {"diverged": float(bool(result.diverged)), "seconds": result.wall_seconds}
        if math.isfinite(result.loss):
            metrics |= {"loss": result.loss, "train_loss": result.train_loss}
        if result.clip_fraction is not None:
            metrics["clip_fraction"] = result.clip_fraction
        board.add_hparams(words | settings_of(trial), metrics, run_name=result.key[:12])
    board.close()
