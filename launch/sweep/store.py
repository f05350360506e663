"""The store of results: one folder per trial, named by its digest, for all sweeps.

`result.json` is written last and by a rename, so it is whole or absent: a kill loses only what was
running. Beside it lies the log of whoever ran the trial. Every start appends one line to
`starts.jsonl`, so that it can be counted what ran.
"""

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interlace.trainer.run_folder import write_json

RESULT_NAME = "result.json"
LOG_NAME = "log.txt"
STARTS_NAME = "starts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one trial gave.

    Attributes:
        key: Digest of recipe, text and code.
        loss: Held-out loss after the last step in nats per token; infinite if it diverged.
        train_loss: Mean training loss over the last 5% of the steps; infinite if it diverged.
        diverged: In words, why it counts as diverged; empty if it did not.
        steps: Finished steps.
        clip_fraction: Share of coordinates clipped, over the last 10% of the records that tell.
        wall_seconds: Time that the trial took.
        cpu_seconds: Processor time of the process that ran it.
        shape: Digest of what decides how long it takes.
        threads: Threads it computed with.
        device: `cpu` or `cuda`.
        code: Digest of the code.
        recipe: The whole recipe.
        curve: By name (`step`, `loss`, `val_loss`, `clip_fraction`) one entry per step; None where
            a step has none or it is not finite.
    """

    key: str
    loss: float
    train_loss: float
    diverged: str
    steps: int
    clip_fraction: float | None
    wall_seconds: float
    cpu_seconds: float
    shape: str
    threads: int
    device: str
    code: str
    recipe: dict[str, Any]
    curve: dict[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])


class Store:
    """Results by digest.

    Args:
        folder: Where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def folder_of(self, key: str) -> Path:
        """Return the folder of a trial."""
        return self.folder / key

    def log_of(self, key: str) -> Path:
        """Return the log of whoever runs a trial."""
        return self.folder_of(key) / LOG_NAME

    def read(self, key: str) -> Result | None:
        """Return the result of a trial, or None if it has not finished yet."""
        path = self.folder_of(key) / RESULT_NAME
        if not path.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("loss", "train_loss"):
            values[name] = math.inf if values[name] is None else values[name]
        return Result(**values)

    def write(self, result: Result) -> None:
        """Keep a result; what another process has kept meanwhile stays, for it is the same."""
        folder = self.folder_of(result.key)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RESULT_NAME).is_file():
            return
        values = asdict(result)
        for name in ("loss", "train_loss"):
            values[name] = values[name] if math.isfinite(values[name]) else None
        write_json(folder / RESULT_NAME, values)

    def begin(self, key: str) -> Path:
        """Note that a trial starts here and now; return a fresh folder for its run."""
        folder = self.folder_of(key)
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        run = folder / f"run.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(run, ignore_errors=True)
        line = {"key": key, "host": socket.gethostname(), "process": os.getpid()}
        text = json.dumps(line | {"time": round(time.time(), 3)}) + "\n"
        # One write of a short line at the end of a file is not torn by those of others.
        with (self.folder / STARTS_NAME).open("a", encoding="utf-8") as file:
            file.write(text)
        return run

    def starts(self) -> list[str]:
        """Return the digest of every trial that was started here, once for each start."""
        path = self.folder / STARTS_NAME
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["key"]) for line in lines]

    def results(self) -> Iterator[Result]:
        """Yield every result there is."""
        for path in sorted(self.folder.glob(f"*/{RESULT_NAME}")):
            result = self.read(path.parent.name)
            if result is not None:
                yield result


def remove_abandoned(folder: Path) -> None:
    """Delete run folders of processes of this machine that are gone."""
    for run in folder.glob(f"run.{socket.gethostname()}.*"):
        process = run.name.rpartition(".")[2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
            shutil.rmtree(run, ignore_errors=True)
