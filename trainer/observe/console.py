"""What scrolls by: one aligned line per logged step, a progress bar on a terminal, notes between.

Without a terminal only lines are printed, with no control codes. Ranks other than 0 print nothing.
"""

import sys
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

from interlace.trainer.observe.metrics import StepRecord
from interlace.trainer.observe.units import human_bytes, human_count, human_duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

RATE_WINDOW = 50


class Console:
    """Prints the progress of one run.

    Args:
        total_steps: Steps of the whole run.
        log_every_steps: Steps between lines.
        is_main: Whether this rank prints at all.
    """

    def __init__(self, total_steps: int, log_every_steps: int, is_main: bool) -> None:
        self.total_steps = total_steps
        self.log_every_steps = log_every_steps
        self.is_main = is_main
        self.recent: deque[float] = deque(maxlen=RATE_WINDOW)
        self.progress: Progress | None = None
        self.bar: TaskID | None = None
        if is_main and sys.stdout.isatty():
            self.open_bar()

    def open_bar(self) -> None:
        """Draw the progress bar below the lines."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        self.progress = Progress(*columns, transient=True)
        self.progress.start()
        self.bar = self.progress.add_task("step", total=self.total_steps, eta="")

    def step(self, record: StepRecord) -> None:
        """Take note of a finished step; print its line if one is due, and its validation if
        there is one.
        """
        if not self.is_main:
            return
        self.recent.append(record.step_seconds or 0.0)
        eta = human_duration(self.seconds_left(record.step))
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=record.step, eta=f"eta {eta}")
        if is_logged(record.step, self.total_steps, self.log_every_steps):
            self.print(self.step_line(record, eta))
        if record.val_loss is not None:
            self.print(self.validation_line(record))

    def seconds_left(self, step: int) -> float:
        """Estimate the rest from the median of the recent steps, which one slow step does not
        move.
        """
        ordered = sorted(self.recent)
        return ordered[len(ordered) // 2] * (self.total_steps - step)

    def place(self, step: int) -> str:
        """Return `step  n/total`, of constant width."""
        total = str(self.total_steps)
        return f"step {step:>{len(total)}}/{total}"

    def step_line(self, record: StepRecord, eta: str) -> str:
        """Return the line of one step; columns keep their width through a run."""
        memory = record.device_memory_bytes or record.host_memory_bytes or 0
        columns = (
            self.place(record.step),
            f"loss {record.loss or 0.0:7.4f}",
            f"lr {record.lr or 0.0:.2e}",
            f"grad {record.grad_norm or 0.0:6.2f}",
            f"{human_count(record.tokens_per_second or 0.0):>6} tok/s",
            f"MFU {100 * (record.mfu or 0.0):3.0f}%",
            f"{human_bytes(memory):>9}",
            f"eta {eta}",
        )
        return "   ".join(columns)

    def validation_line(self, record: StepRecord) -> str:
        """Return the line of one validation."""
        return (
            f"{self.place(record.step)}   validation   loss {record.val_loss:.4f}   "
            f"{record.val_bits_per_byte:.4f} bits/byte   perplexity {record.val_perplexity:.2f}"
        )

    def note(self, text: str) -> None:
        """Print a message of its own."""
        if self.is_main:
            self.print(text)

    def print(self, text: str) -> None:
        """Print above the bar, or plainly."""
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar; may be called twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_logged(step: int, total_steps: int, log_every_steps: int) -> bool:
    """Whether the line of a step (from 1) is printed: every so many, the first and the last."""
    return step % log_every_steps == 0 or step in (1, total_steps)
