"""What can be done to a rank before it starts, besides arming a failpoint.

Each hook changes something around the program in the process that was forked for the rank, and
nothing in the program: its threads, the clock on its wall, or a look at what it reads and loads.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def apply(hooks: Mapping[str, Any]) -> None:
    """Apply hooks by name, as an order names them."""
    for name, value in hooks.items():
        HOOKS[name](value)


def use_threads(count: int) -> None:
    """Compute with so many threads, as OMP_NUM_THREADS at the start of a process would have it."""
    import torch

    torch.set_num_threads(count)


def log_rows(path: str) -> None:
    """Write every training row that is read, as `step number source row`; a killed process has
    written all that it read.
    """
    from interlace.trainer.data.rows import TrainingRows

    read = TrainingRows.row
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def logged(self: TrainingRows, step: int, number: int) -> Any:
        source, row = self.order[step * self.rows_per_step + number]
        os.write(log, f"{step} {number} {source} {row}\n".encode())
        return read(self, step, number)

    TrainingRows.row = logged


def log_digest(path: str) -> None:
    """Write the digest of the whole state right after it is restored, as stored_digest has it."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "cases"))
    from digests import live_tensors
    from tiny_run import digest_of

    from interlace.trainer import assembly
    from interlace.trainer.checkpoint.state import TrainingState

    restore: Callable[..., Any] = assembly.restore

    def logged(*arguments: Any) -> Any:
        outcome = restore(*arguments)
        [state] = [one for one in arguments if isinstance(one, TrainingState)]
        digest = digest_of(live_tensors(state))
        if state.world.is_main:
            Path(path).write_text(digest, encoding="utf-8")
        return outcome

    assembly.restore = logged


def skew_clock(seconds: float) -> None:
    """Let the clock on the wall be wrong by so much, and jump back by twice that much soon."""
    real, read = time.time, 0

    def wrong() -> float:
        nonlocal read
        read += 1
        return real() + seconds - (2 * abs(seconds) if read > 100 else 0.0)

    class Wrong(datetime.datetime):
        """What modules of ours know as `datetime`."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Wrong":
            return cls.fromtimestamp(wrong(), tz)

    time.time = wrong
    time.time_ns = lambda: int(wrong() * 1e9)
    for name, module in list(sys.modules.items()):
        if name.startswith("interlace.") and getattr(module, "datetime", 0) is datetime.datetime:
            module.datetime = Wrong  # type: ignore[attr-defined]


HOOKS: dict[str, Callable[[Any], None]] = {
    "threads": use_threads,
    "rows": log_rows,
    "digest": log_digest,
    "clock": skew_clock,
}
