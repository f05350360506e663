"""Runs that are broken on purpose: start ranks, kill them, start them again, and judge.

A `Template` forks ranks (see `fork_template`), an `Attempt` is one start of a run on some ranks, a
`Drill` is a run folder with all its attempts. Kills are SIGKILL to one rank; as a launcher does,
the others are given a while to end by themselves and are then ended.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

GRACE_SECONDS = 20.0
"""How long ranks may go on after one of them has died, before they are ended."""

LONGEST_SECONDS = 240.0
"""A start that takes longer hangs; every run here takes seconds on a quiet machine."""


class Template:
    """The process that ranks are forked from, as a context manager."""

    def __enter__(self) -> "Template":
        program = Path(__file__).with_name("fork_template.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        )
        assert self.answer() == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def answer(self) -> str:
        """Return the next line that the template writes."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def order(self, **order: object) -> int:
        """Give one order; return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.answer())


@dataclass
class Rank:
    """One process of an attempt."""

    pid: int
    descriptor: int
    """A pidfd: readable once the process has ended, and never another process's."""

    code: int | None = None
    ended: float | None = None
    """When it was seen to have ended, by the monotonic clock."""


@dataclass
class Attempt:
    """One start of a run: its ranks and what they printed."""

    template: Template
    ranks: list[Rank]
    outputs: list[Path]
    promised_step: int = 0
    """The largest step that was acknowledged when it began."""

    steps_before: int = 0
    """The last step that metrics.jsonl held when it began."""

    fault: float | None = None
    """When the first rank of the start before ended, by the monotonic clock."""

    new_step_at: float | None = None
    """When it was first seen to be further than the start before, by the monotonic clock."""

    def resumed_step(self) -> int | None:
        """Return the step that it went on from, 0 for a new run; None if it never came so far."""
        printed = self.said(0)
        if resumed := re.search(r"resumed from the checkpoint of step (\d+)", printed):
            return int(resumed[1])
        return 0 if "run folder" in printed else None

    def said(self, rank: int) -> str:
        """Return what one rank has printed."""
        return self.outputs[rank].read_text(encoding="utf-8", errors="replace")

    def wait_until_stopped(self, *ranks: int, longest_seconds: float = LONGEST_SECONDS) -> None:
        """Wait until each of these ranks has stopped itself (action `stop` of a failpoint)."""
        deadline = time.monotonic() + longest_seconds
        while not all(self.is_stopped(rank) for rank in ranks):
            self.poll(0.02)
            ended = [rank for rank in ranks if self.ranks[rank].code is not None]
            if ended or time.monotonic() > deadline:
                self.kill()
                self.wait()
                raise AssertionError(f"ranks {ended or ranks} did not stop:\n{self.printed()}")

    def is_stopped(self, rank: int) -> bool:
        """Whether a rank is stopped by a signal."""
        status = Path(f"/proc/{self.ranks[rank].pid}/stat").read_text(encoding="utf-8")
        return status.rpartition(")")[2].split()[0] == "T"

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].code is None:
                signal.pidfd_send_signal(self.ranks[rank].descriptor, number)

    def kill(self, *ranks: int) -> None:
        """Kill some ranks at once, or all: stopped first, so that none sees another die."""
        self.signal(signal.SIGSTOP, *ranks)
        self.signal(signal.SIGKILL, *ranks)

    def poll(self, seconds: float) -> bool:
        """Wait so long for a rank to end; return whether all have ended."""
        living = {rank.descriptor: rank for rank in self.ranks if rank.code is None}
        poller = select.poll()
        for descriptor in living:
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(seconds * 1000) if living else []:
            rank = living[descriptor]
            rank.ended = time.monotonic()
            rank.code = self.template.order(reap=rank.pid)
            os.close(descriptor)
        return all(rank.code is not None for rank in self.ranks)

    def wait(self, longest_seconds: float = LONGEST_SECONDS) -> list[int]:
        """Wait for every rank; return their exit codes, minus the signal for those killed.

        Once one rank has failed the others may take `GRACE_SECONDS` to notice.
        """
        deadline = time.monotonic() + longest_seconds
        while not self.poll(0.05):
            failed = [rank.ended for rank in self.ranks if rank.code]
            now = time.monotonic()
            if now > deadline:
                self.kill()
                raise AssertionError(f"ranks hang:\n{self.printed()}")
            if failed and now > min(when for when in failed if when) + GRACE_SECONDS:
                self.kill()
        return [rank.code for rank in self.ranks if rank.code is not None]

    @property
    def first_end(self) -> float | None:
        """When the first rank ended, by the monotonic clock; None while all live."""
        return min((rank.ended for rank in self.ranks if rank.ended is not None), default=None)

    def printed(self) -> str:
        """Return what all ranks printed."""
        return "\n".join(
            f"--- rank {rank}\n{path.read_text(encoding='utf-8', errors='replace')}"
            for rank, path in enumerate(self.outputs)
            if path.is_file()
        )


@dataclass(frozen=True)
class Recovery:
    """How a run went on after a fault.

    Attributes:
        lost_steps: Finished steps that were taken again.
        seconds: From the first death of a rank to the first step that was new, or to the end of
            the run where none was left.
    """

    lost_steps: int
    seconds: float


@dataclass
class Drill:
    """A run folder, and whatever is started in it.

    Args:
        template: Where ranks come from.
        home: A folder of its own; the run lies in `home/run`, the log of commits beside it.
        words: What stands behind `interlace train`, without `run.dir`.
    """

    template: Template
    home: Path
    words: Sequence[str]
    attempts: list[Attempt] = field(default_factory=list[Attempt])

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.home / "run"

    @property
    def temporary(self) -> Path:
        """Where its processes put temporary files."""
        return self.home / "temporary"

    @property
    def ack_log(self) -> Path:
        """The log of acknowledged commits, outside the run."""
        return self.home / "acknowledged"

    def start(
        self,
        ranks: int = 1,
        failpoint: str | None = None,
        victims: Sequence[int] = (0,),
        environment: Mapping[str, str] | None = None,
        words: Sequence[str] = (),
        hooks: Callable[[int], Mapping[str, object]] = lambda rank: {},
    ) -> Attempt:
        """Start the run, or go on with it.

        Args:
            ranks: Number of processes.
            failpoint: A setting of INTERLACE_FAILPOINT for the ranks that `victims` names.
            victims: These ranks.
            environment: More variables, for all ranks.
            words: More settings than the drill's.
            hooks: What is done to each rank before it starts; see rank_hooks.py.
        """
        self.temporary.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        fault = self.attempts[-1].first_end if self.attempts else None
        attempt = Attempt(self.template, [], [], self.promised_step(), self.steps_done(), fault)
        always = {"INTERLACE_ACK_LOG": str(self.ack_log), "TMPDIR": str(self.temporary)}
        for rank in range(ranks):
            settings = {**always, **(environment or {})}
            if ranks > 1:
                settings |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                settings |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if failpoint is not None and rank in victims:
                settings["INTERLACE_FAILPOINT"] = failpoint
            output = self.home / f"start-{len(self.attempts) + 1}-rank-{rank}.txt"
            pid = self.template.order(
                words=["train", *self.words, f"run.dir={self.run}", *words],
                environment=settings,
                hooks=dict(hooks(rank)),
                folder=str(self.home),
                output=str(output),
            )
            attempt.ranks.append(Rank(pid, os.pidfd_open(pid)))
            attempt.outputs.append(output)
        self.attempts.append(attempt)
        return attempt

    def follow(self, seconds: float = LONGEST_SECONDS) -> bool:
        """Wait so long for the newest start to end, and note when it took its first new step.

        Returns:
            Whether a rank has ended.
        """
        attempt, deadline = self.attempts[-1], time.monotonic() + seconds
        while time.monotonic() < deadline:
            attempt.poll(min(0.02, max(0.0, deadline - time.monotonic())))
            ended = any(rank.code is not None for rank in attempt.ranks)
            further = attempt.resumed_step() is not None and (
                self.steps_done() > attempt.steps_before
            )
            if attempt.new_step_at is None and (further or ended):
                attempt.new_step_at = time.monotonic() if further else attempt.first_end
            if ended:
                return True
        return False

    def finish(
        self,
        ranks: int = 1,
        words: Sequence[str] = (),
        hooks: Callable[[int], Mapping[str, object]] = lambda rank: {},
    ) -> Recovery:
        """Start once more, hold it to a good end, and say how it went on from the start before."""
        attempt = self.start(ranks, words=words, hooks=hooks)
        self.follow()
        codes = attempt.wait()
        assert codes == [0] * ranks, attempt.printed()
        return self.recoveries()[-1] if len(self.attempts) > 1 else Recovery(0, 0.0)

    def recoveries(self) -> list[Recovery]:
        """Return how the run went on after every start that was followed by one which came further,
        or to the end.
        """
        found: list[Recovery] = []
        for attempt in self.attempts:
            resumed, at = attempt.resumed_step(), attempt.new_step_at
            if attempt.fault is not None and resumed is not None and at is not None:
                lost = max(0, attempt.steps_before - resumed)
                found.append(Recovery(lost, at - attempt.fault))
        return found

    def steps_done(self) -> int:
        """Return the last step that metrics.jsonl holds; 0 if there is none."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # The process may have been killed, or be, within the last line.
        whole = [line for line in lines[-2:] if line.endswith("}")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def promised_step(self) -> int:
        """Return the largest step that was acknowledged; 0 if none was."""
        text = self.ack_log.read_text(encoding="utf-8") if self.ack_log.is_file() else ""
        return max((int(step) for step in re.findall(r"step (\d+)", text)), default=0)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
