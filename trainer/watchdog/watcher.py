"""The process that watches one rank of this machine, and ends with it.

It learns that its rank is gone by the parent it has, which is another once the rank is dead. A
socket leads to a thread of the rank: the rank says goodbye on it, and the watcher asks it to leave.
A rank that does not follow within two seconds, since it is stopped or its interpreter is held, is
killed.
"""

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from interlace.trainer.ends import End, Kind, ends_folder, record_end
from interlace.trainer.heartbeat import PULSE_BYTES, Pulse, read_pulse
from interlace.trainer.watchdog.patience import Patience
from interlace.trainer.watchdog.reports import Alarm, Report, wait_until
from interlace.trainer.watchdog.stacks import frames_of
from interlace.trainer.watchdog.verdict import culprits, is_stall, page, verdict

GOODBYE = b"goodbye"
LEAVE = b"leave"
REPORTS_WITHIN = 10.0
LEAVES_WITHIN = 2.0
_STATES = {"T": "stopped", "t": "stopped", "R": "running", "Z": "ended", "X": "ended"}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The rank that is watched.

    Attributes:
        run_dir: The run folder.
        attempt: Number of this start.
        rank: The rank.
        size: Number of ranks.
        pid: Its process.
        thread: Identity of the thread that trains, whose stack is shown.
        seconds: Limit without progress; None for one that learns.
        stalled_status: Exit status of a rank that stalled.
    """

    run_dir: str
    attempt: int
    rank: int
    size: int
    pid: int
    thread: int
    seconds: float | None
    stalled_status: int

    @property
    def folder(self) -> Path:
        """Where the ends of this attempt lie."""
        return ends_folder(Path(self.run_dir), self.attempt)

    @property
    def stacks_path(self) -> Path:
        """Where the rank writes its stacks when asked to."""
        return self.folder / f"rank-{self.rank}.stacks"


class Watcher:
    """Watches one rank.

    Args:
        watched: The rank.
        memory: Descriptor of the memory that holds its pulse.
        line: The socket to it.
    """

    def __init__(self, watched: Watched, memory: int, line: socket.socket) -> None:
        self.watched = watched
        self.memory = mmap.mmap(memory, PULSE_BYTES, prot=mmap.PROT_READ)
        self.line = line
        self.patience = Patience(watched.seconds)
        self.alarm = Alarm(watched.folder, 1)
        self.tick = min(0.5, max(0.1, (watched.seconds or 10.0) / 20))

    def run(self) -> None:
        """Watch until the rank says goodbye, is gone, or has to be ended."""
        last = time.monotonic()
        while not self.left():
            now = time.monotonic()
            # When this process was kept from running, the rank was so too, and is not to blame.
            seen = min(now - last, 4 * self.tick)
            self.patience.observe(self.pulse(), seen, moved_bytes(self.watched.pid))
            last = now
            if (self.patience.lost or self.alarmed()) and self.ended_stall():
                return

    def left(self) -> bool:
        """Wait for one tick; return whether the rank has left, having recorded how if it did not
        say goodbye.
        """
        ready, _, _ = select.select([self.line], [], [], self.tick)
        if ready and self.line.recv(len(GOODBYE)) == GOODBYE:
            return True
        if not (ready or self.gone()):
            return False
        # Nobody holds the other end any more: the rank is ending or has ended.
        if wait_until(self.gone, LEAVES_WITHIN):
            reason = "ended without a word: killed by a signal, out of memory, or crashed"
            self.record("vanished", reason, None, self.last_words())
        return True

    def gone(self) -> bool:
        """Whether the rank's process is no more."""
        return os.getppid() != self.watched.pid

    def pulse(self) -> Pulse:
        """Return what the rank has told last."""
        return read_pulse(self.memory)

    def alarmed(self) -> bool:
        """Whether the watcher of another rank has lost patience."""
        try:
            return self.watched.size > 1 and self.alarm.raised
        except OSError:
            return False

    def ended_stall(self) -> bool:
        """Ask all watchers; if the run stands still, tell who waits for whom and end the rank.

        Returns:
            Whether it did; if not, the alarm was false, and this rank is given more time.
        """
        own = self.report()
        try:
            self.alarm.raise_it()
            own = replace(own, stack=self.stack_of_rank(own.state))
            watched = self.watched
            reports = self.alarm.collect(own, watched.size, watched.attempt, REPORTS_WITHIN)
            stall = self.decided(reports)
        except OSError as error:
            # Without the run folder the watchers cannot meet; each speaks for its own rank.
            self.say(f"interlace: {self.watched.run_dir} cannot be used: {error}")
            reports, stall = [own], own.late
            if stall:
                self.tell(reports)
        self.alarm = Alarm(self.watched.folder, self.alarm.number + 1)
        if not stall:
            if own.late:
                self.patience.extend()
            return False
        guilty = not (found := culprits(reports)) or own.rank in [each.rank for each in found]
        kind: Kind = "stalled" if guilty else "waiting"
        self.record(kind, verdict(reports), self.watched.stalled_status, "\n".join(own.stack))
        self.end_rank(own.state)
        return True

    def decided(self, reports: Sequence[Report]) -> bool:
        """Return whether the run is ended, as the leader decides: rank 0's watcher, or another
        should that one be gone.
        """
        if self.watched.rank != 0:
            wait_until(lambda: self.alarm.decision() is not None, 2 * REPORTS_WITHIN)
        decision = self.alarm.decision()
        if decision is None and self.alarm.lead():
            decision = is_stall(reports)
            if decision:
                self.tell(reports)
            self.alarm.decide(decision)
        return is_stall(reports) if decision is None else decision

    def tell(self, reports: Sequence[Report]) -> None:
        """Print who waits for whom, for all ranks."""
        self.say(page(reports, str(self.watched.folder)))

    def say(self, text: str) -> None:
        """Print, if there is still a terminal; a rank that hangs is ended without one too."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def report(self) -> Report:
        """Return how the rank stands, without its stack."""
        pulse = self.pulse()
        return Report(
            rank=self.watched.rank,
            phase=pulse.phase,
            step=pulse.step,
            marks=pulse.marks,
            idle=self.patience.idle,
            limit=self.patience.limit,
            state=self.state(),
        )

    def state(self) -> str:
        """Return what the system says of the rank's process."""
        if self.gone():
            return "ended"
        try:
            text = Path(f"/proc/{self.watched.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return "running"
        return _STATES.get(text.rpartition(")")[2].split()[0], "waiting")

    def stack_of_rank(self, state: str) -> list[str]:
        """Let the rank write the stacks of all its threads; return that of the training thread.

        Works while the interpreter's lock is held, not if the process is stopped.
        """
        if state in ("stopped", "ended"):
            return []
        path = self.watched.stacks_path
        before = path.stat().st_size
        os.kill(self.watched.pid, signal.SIGUSR1)
        seen = [before, -1]

        def written() -> bool:
            seen[1], seen[0] = seen[0], path.stat().st_size
            return before < seen[0] == seen[1]

        wait_until(written, LEAVES_WITHIN)
        text = path.read_bytes()[before:].decode("utf-8", "replace")
        return frames_of(text, self.watched.thread)

    def last_words(self) -> str:
        """Return what faulthandler wrote when the process crashed, if it did."""
        try:
            return self.watched.stacks_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def record(self, kind: Kind, reason: str, status: int | None, traceback: str) -> None:
        """Write how the rank ended."""
        watched, pulse = self.watched, self.pulse()
        end = End(
            attempt=watched.attempt,
            rank=watched.rank,
            kind=kind,
            reason=reason,
            status=status,
            step=pulse.step,
            phase=pulse.phase,
            traceback=traceback,
            pid=watched.pid,
        )
        record_end(Path(watched.run_dir), end)

    def end_rank(self, state: str) -> None:
        """Ask the rank to leave with the status of a stall; kill it if it cannot."""
        if state != "stopped":
            try:
                self.line.sendall(LEAVE)
            except OSError:
                return
            if wait_until(self.gone, LEAVES_WITHIN):
                return
        if not self.gone():
            os.kill(self.watched.pid, signal.SIGKILL)


def moved_bytes(pid: int) -> int:
    """Return what a process has read and written so far, from files, pipes and disks; 0 where the
    system does not tell.
    """
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counted = ("rchar", "wchar", "read_bytes")
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in counted)
