"""The record of a run: one JSON object a line in `metrics.jsonl`, and the same in TensorBoard.

After a kill, lines beyond the checkpoint that training continues from are dropped, so that every
step stands in the file exactly once. Floats are written with all their digits: equal text means
equal bits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from interlace.trainer.observe.patient_lines import PatientLines

METRICS_NAME = "metrics.jsonl"

TENSORBOARD_TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "val_bits_per_byte": "loss/validation_bits_per_byte",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "update_seconds": "speed/update_seconds",
    "exposed_update_seconds": "speed/exposed_update_seconds",
    "device_memory_bytes": "memory/device_bytes",
    "host_memory_bytes": "memory/host_bytes",
}

DETAIL_TAG = "model/"
"""Where TensorBoard shows what objective and blocks report."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step; what does not apply is None and left out of the file.

    Attributes:
        step: Finished steps, from 1.
        tokens: Tokens consumed so far.
        loss: Mean training loss in nats per token; may be NaN or infinite on a skipped step.
        lr: Learning rate of the update.
        grad_norm: Global gradient norm before clipping.
        tokens_per_second: Over all ranks.
        mfu: Share of the peak rate of matrix products.
        device_memory_bytes: Peak allocated on the accelerator.
        host_memory_bytes: Resident memory of rank 0's process.
        step_seconds: Wall time of the step, validation left out.
        update_seconds: Time of the newest finished update, from its first to its last event; with
            overlap that is the update of the step before.
        exposed_update_seconds: The part of it that step and forward waited for.
        val_loss: Held-out loss in nats per token.
        val_bits_per_byte: Held-out bits per byte of text.
        val_perplexity: exp(val_loss).
        skipped: True where the update was left out.
        details: What objective and blocks report of the step; keys of their own in the file.
    """

    step: int
    tokens: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    step_seconds: float | None = None
    update_seconds: float | None = None
    exposed_update_seconds: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_perplexity: float | None = None
    skipped: bool | None = None
    details: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins that lie side by side.

    Attributes:
        edges: Where bins end, ascending, one more than there are counts: first the lower edge.
        counts: Of each bin; copies on several ranks may make them fractions.
    """

    edges: Sequence[float]
    counts: Sequence[float]


def to_line(record: StepRecord) -> str:
    """Return a record as one line of JSON; numbers that are not finite, which JSON lacks, as
    text.
    """
    own = asdict(record)
    details = own.pop("details")
    values = {key: value for key, value in own.items() if value is not None} | details
    shown = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return json.dumps(shown, allow_nan=False) + "\n"


def from_line(line: str) -> StepRecord | None:
    """Read one line; None for one that a kill has torn."""
    try:
        values: dict[str, Any] = json.loads(line)
        numbers = {
            key: cast(Any, float(value) if isinstance(value, str) else value)
            for key, value in values.items()
        }
        known = {each.name for each in fields(StepRecord)} - {"details"}
        details = {key: float(value) for key, value in numbers.items() if key not in known}
        return StepRecord(
            **{key: value for key, value in numbers.items() if key in known}, details=details
        )
    except (ValueError, TypeError, AttributeError):
        return None


def read_metrics(path: Path) -> list[StepRecord]:
    """Return the records of a `metrics.jsonl`, a torn line left out; none if the file is
    missing.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [record for line in file if (record := from_line(line)) is not None]


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard.

    Args:
        run_dir: The run folder.
        resume_step: Last step that counts; later records of an earlier start are dropped.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        path = run_dir / METRICS_NAME
        kept = [record for record in read_metrics(path) if record.step <= resume_step]
        temporary = path.with_name(f".{METRICS_NAME}")
        temporary.write_text("".join(map(to_line, kept)), encoding="utf-8")
        temporary.replace(path)
        self.lines = PatientLines(path)
        purge = resume_step + 1 if resume_step else None
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, record: StepRecord) -> None:
        """Append one step."""
        self.lines.write(to_line(record))
        tagged = {tag: getattr(record, key) for key, tag in TENSORBOARD_TAGS.items()}
        self.show({tag: value for tag, value in tagged.items() if value is not None}, record.step)
        self.write_of_tensors(record.details, record.step)

    def show(self, numbers: Mapping[str, float], step: int) -> None:
        """Give TensorBoard numbers by tag, as long as the disk has room: it has shown enough then,
        and the record is in `metrics.jsonl`.
        """
        with suppress(OSError):
            for tag, value in numbers.items():
                self.board.add_scalar(tag, value, step)

    def write_of_tensors(self, numbers: Mapping[str, float], step: int) -> None:
        """Show numbers of single tensors in TensorBoard, where a record would be too long."""
        self.show({DETAIL_TAG + name: value for name, value in numbers.items()}, step)

    def write_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Give TensorBoard the histograms of one step, by name; those without counts it cannot
        show are left out.
        """
        for name, histogram in histograms.items():
            edges, counts = histogram.edges, histogram.counts
            if not sum(counts):
                continue
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            pairs = list(zip(middles, counts, strict=True))
            with suppress(OSError):
                self.board.add_histogram_raw(
                    DETAIL_TAG + name,
                    min=edges[0],
                    max=edges[-1],
                    num=sum(counts),
                    sum=sum(middle * count for middle, count in pairs),
                    sum_squares=sum(middle**2 * count for middle, count in pairs),
                    bucket_limits=list(edges[1:]),
                    bucket_counts=list(counts),
                    global_step=step,
                )

    def close(self) -> None:
        """Flush and close both; may be called twice."""
        self.lines.close()
        with suppress(OSError):
            self.board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
