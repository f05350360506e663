"""What the watchers of all ranks tell each other when the run stands still.

The watcher that loses patience first raises an alarm, an empty file in the folder of the attempt's
ends. Every watcher looks for it, takes the stacks of its own rank and reports. So nobody judges a
rank from afar: what a report says of seconds is measured on the clock of the machine it is about.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from interlace.trainer.ends import End, ends_of, read_document, write_document

ALARM_NAME = "stalled"
CLAIM_NAME = "stalled.told"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank as its watcher sees it when the run stands still.

    Attributes:
        rank: The rank.
        phase: Name of the phase it is in.
        step: Its step, from 1; 0 before the first.
        marks: Phases entered so far: how far it has come.
        idle: Seconds without a sign of life.
        state: `running`, `waiting`, `stopped` (by a signal), `ended`, or `silent`: its watcher does
            not answer either.
        stack: Python stack of the training thread, innermost frame first; may be empty.
        host: Name of the machine.
    """

    rank: int
    phase: str = ""
    step: int = 0
    marks: int = 0
    idle: float = 0.0
    state: str = "silent"
    stack: list[str] = field(default_factory=list[str])
    host: str = field(default_factory=socket.gethostname)


def raise_alarm(folder: Path) -> None:
    """Tell every watcher that one has lost patience."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ALARM_NAME).touch()


def alarm_raised(folder: Path) -> bool:
    """Whether any watcher has lost patience."""
    return (folder / ALARM_NAME).exists()


def report_path(folder: Path, rank: int) -> Path:
    """Return the file of one rank's report."""
    return folder / f"rank-{rank}.stalled.json"


def send_report(folder: Path, report: Report) -> None:
    """Let all watchers read a report."""
    write_document(report_path(folder, report.rank), asdict(report))


def read_report(folder: Path, rank: int) -> Report | None:
    """Return the report of a rank; None if there is none yet."""
    document = read_document(report_path(folder, rank))
    known = {each.name for each in fields(Report)}
    return None if document is None else Report(**{k: document[k] for k in known & set(document)})


def collect(folder: Path, size: int, attempt: int, patience: float) -> list[Report]:
    """Wait for the reports of all ranks; those that do not come are `silent` or `ended`.

    Args:
        folder: Of the attempt's ends, RUN/ends/attempt-N.
        size: Number of ranks.
        attempt: Number of the attempt.
        patience: Most seconds to wait.
    """
    found: dict[int, Report] = {}

    def complete() -> bool:
        for rank in range(size):
            if rank not in found and (report := read_report(folder, rank)) is not None:
                found[rank] = report
        for end in ends_of(folder.parents[1], attempt):
            found.setdefault(end.rank, of_ended(end))
        return len(found) >= size

    wait_until(complete, patience)
    return [found.get(rank) or Report(rank=rank, host="?") for rank in range(size)]


def of_ended(end: End) -> Report:
    """Return what is known of a rank that has ended."""
    return Report(rank=end.rank, phase=end.phase, step=end.step, state="ended", host=end.host)


def claim(folder: Path) -> bool:
    """Take the right to tell; only one watcher gets it."""
    try:
        (folder / CLAIM_NAME).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_until(happened: Callable[[], bool], seconds: float) -> bool:
    """Look 20 times a second; return whether it happened in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
