"""What the watchers of all ranks tell each other when the run seems to stand still.

The watcher that loses patience first raises an alarm: a folder beside the attempt's ends. Every
watcher looks for it, takes the stacks of its own rank and reports there. So nobody judges a rank
from afar: what a report says of seconds is measured on the clock of the machine it is about. One
watcher leads: it reads all reports and decides whether the run is ended. It is not if the ranks
that others wait for have reasons to take their time, such as a slow disk.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from interlace.trainer.ends import End, ends_of, read_document, write_document

RESEND_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank as its watcher sees it when the run seems to stand still.

    Attributes:
        rank: The rank.
        phase: Name of the phase it is in.
        step: Its step, from 1; 0 before the first.
        marks: Phases entered so far: how far it has come.
        idle: Seconds without a sign of life.
        limit: Seconds that are allowed where it is.
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
    limit: float = 0.0
    state: str = "silent"
    stack: list[str] = field(default_factory=list[str])
    host: str = field(default_factory=socket.gethostname)

    @property
    def late(self) -> bool:
        """Whether it has been silent for longer than is allowed."""
        return self.idle > self.limit


@dataclass(frozen=True)
class Alarm:
    """One alarm of an attempt.

    Attributes:
        folder: Where the ends of the attempt lie, RUN/ends/attempt-N.
        number: Alarms are numbered from 1; after a false one comes the next.
    """

    folder: Path
    number: int

    @property
    def path(self) -> Path:
        """The alarm's own folder."""
        return self.folder / f"alarm-{self.number}"

    @property
    def raised(self) -> bool:
        """Whether a watcher has lost patience."""
        return self.path.exists()

    def raise_it(self) -> None:
        """Tell every watcher that one has lost patience."""
        self.path.mkdir(parents=True, exist_ok=True)

    def collect(self, own: Report, size: int, attempt: int, patience: float) -> list[Report]:
        """Send a report and wait for those of all ranks; those that do not come are `silent` or
        `ended`.

        Args:
            own: This rank's report.
            size: Number of ranks.
            attempt: Number of the attempt.
            patience: Most seconds to wait.
        """
        found: dict[int, Report] = {}
        sent = -RESEND_SECONDS

        def complete() -> bool:
            nonlocal sent
            # Clients of network file systems look for new names when they have written one.
            if time.monotonic() > sent + RESEND_SECONDS:
                write_document(self._report_path(own.rank), asdict(own))
                sent = time.monotonic()
            for rank in range(size):
                if rank not in found and (report := self._report_of(rank)) is not None:
                    found[rank] = report
            for end in ends_of(self.folder.parents[1], attempt):
                found.setdefault(end.rank, of_ended(end))
            return len(found) >= size

        wait_until(complete, patience)
        return [found.get(rank) or Report(rank=rank, host="?") for rank in range(size)]

    def _report_path(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.json"

    def _report_of(self, rank: int) -> Report | None:
        document = read_document(self._report_path(rank))
        known = {each.name for each in fields(Report)}
        return None if document is None else Report(**{k: document[k] for k in known & {*document}})

    def lead(self) -> bool:
        """Take the right to decide; only one watcher gets it."""
        try:
            (self.path / "led").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def decide(self, stall: bool) -> None:
        """Tell all watchers whether the run is ended."""
        write_document(self.path / "decision.json", {"stall": stall})

    def decision(self) -> bool | None:
        """Return whether the run is ended; None before that is decided."""
        document = read_document(self.path / "decision.json")
        return None if document is None else bool(document.get("stall"))


def alarms_of(folder: Path) -> list[Alarm]:
    """Return the alarms that an attempt has seen."""
    return [Alarm(folder, number) for number in range(1, len(list(folder.glob("alarm-*"))) + 1)]


def of_ended(end: End) -> Report:
    """Return what is known of a rank that has ended."""
    return Report(rank=end.rank, phase=end.phase, step=end.step, state="ended", host=end.host)


def wait_until(happened: Callable[[], bool], seconds: float) -> bool:
    """Look 20 times a second; return whether it happened in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
