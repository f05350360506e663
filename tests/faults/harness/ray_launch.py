"""Runs under `interlace launch ray` that are broken on purpose, and clusters of several raylets.

A `Launch` is one process of the command with the Ray that it starts; a `Nodes` is a cluster of its
own, of which nodes are killed, frozen and added. Both live in processes beside the test, and
nothing of them is left when their context ends.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

LONGEST_SECONDS = 400.0
"""A launch that takes longer hangs; on a quiet machine one takes half a minute."""

LEAVES_SECONDS = 20.0
"""How long a test waits for what a launcher that it killed has left, before it ends that itself."""

RESUMED = re.compile(
    r"attempt (\d+) resumed at step (\d+) on (\d+) ranks, ([0-9.]+) s after the failure, "
    r"(\d+) steps repeated"
)


@dataclass(frozen=True)
class Resumed:
    """What a launch said of one recovery."""

    attempt: int
    step: int
    ranks: int
    seconds: float
    lost_steps: int


@dataclass
class Launch:
    """A process of `interlace launch ray`, as a context manager.

    Args:
        words: What stands behind `interlace launch ray`.
        home: A folder for its output and temporary files.
        environment: More variables for it and its ranks.
    """

    words: Sequence[str]
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def __enter__(self) -> "Launch":
        self.home.mkdir(parents=True, exist_ok=True)
        self.printed_path = self.home / f"launch-{time.time_ns()}.txt"
        command = [sys.executable, "-m", "interlace.launch.cli", "launch", "ray", *self.words]
        settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", **self.environment}
        self.process = subprocess.Popen(
            command,
            cwd=self.home,
            env={**os.environ, **settings},
            stdout=self.printed_path.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started: set[int] = set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.started |= descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        # What a killed launcher leaves behind ends by itself, and removes its files.
        end = time.monotonic() + LEAVES_SECONDS
        while any(alive(pid) for pid in self.started) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in self.started:
            kill(pid)

    def printed(self) -> str:
        """Return what it has printed so far."""
        return self.printed_path.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, what: Callable[[], object], longest: float = LONGEST_SECONDS) -> None:
        """Wait until something is true, while the launch goes on."""
        end = time.monotonic() + longest
        while not what():
            self.started |= descendants(self.process.pid)
            assert self.process.poll() is None, f"ended too soon:\n{self.printed()}"
            assert time.monotonic() < end, f"waited in vain:\n{self.printed()}"
            time.sleep(0.05)

    def wait(self, longest: float = LONGEST_SECONDS) -> int:
        """Wait for its end; return the exit status."""
        end = time.monotonic() + longest
        while self.process.poll() is None:
            self.started |= descendants(self.process.pid)
            assert time.monotonic() < end, f"hangs:\n{self.printed()}"
            time.sleep(0.1)
        return self.process.returncode

    def resumed(self) -> list[Resumed]:
        """Return the recoveries that it has told of."""
        found = RESUMED.findall(self.printed())
        return [Resumed(int(a), int(s), int(r), float(t), int(n)) for a, s, r, t, n in found]

    def ranks(self) -> list[int]:
        """Return the processes of its ranks."""
        return [pid for pid in descendants(self.process.pid) if is_rank(pid)]


def steps_done(run: Path) -> int:
    """Return the last step that a run has recorded; 0 if there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def acknowledged(log: Path) -> int:
    """Return the largest step in a log of acknowledged commits."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return max((int(step) for step in re.findall(r"step (\d+)", text)), default=0)


def descendants(root: int) -> set[int]:
    """Return a process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    found: set[int] = set()
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting.extend(below)
    return found


def is_rank(pid: int) -> bool:
    """Whether a process is one that Ray Train runs a rank in."""
    return "RayTrainWorker" in command_line(pid)


def rank_of(pid: int) -> int | None:
    """Return the number of the rank that a process is, from the words of its watcher; None before
    it has one.
    """
    for child in descendants(pid):
        if (found := re.search(r'"rank": (\d+)', command_line(child))) is not None:
            return int(found[1])
    return None


def command_line(pid: int) -> str:
    """Return how a process is called; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def wait_until_gone(pids: Iterable[int], longest: float) -> None:
    """Wait until none of these processes is there."""
    end = time.monotonic() + longest
    while left := [command_line(pid) or str(pid) for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process is there and more than an entry that nobody has collected."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Nodes:
    """A cluster of raylets on this machine, as a context manager.

    Args:
        home: A folder for its token.
        authentication: Ray's mode of it.
    """

    def __init__(self, home: Path, authentication: str = "token") -> None:
        self.authentication = authentication
        self.token = home / "token"
        self.token.write_text(secrets.token_hex(32), encoding="utf-8")
        self.token.chmod(0o600)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of whoever joins it."""
        return {"RAY_AUTH_MODE": self.authentication, "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def __enter__(self) -> "Nodes":
        program = Path(__file__).with_name("ray_nodes.py")
        # Ray looks for a dead node less often than a test can wait.
        quick = {
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "4",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **self.environment, **quick, "OMP_NUM_THREADS": "1"},
        )
        started = self.answer()
        self.address, self.logs = started["address"], Path(started["logs"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        started = descendants(self.process.pid)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        for pid in started:
            kill(pid)

    def answer(self) -> dict[str, str]:
        """Return the next thing that the process says."""
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            assert line, "the cluster has ended"
            if line.startswith("{"):
                return json.loads(line)

    def add(self, cpus: int = 1) -> int:
        """Add a node; return the process of its raylet."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{cpus}\n")
        self.process.stdin.flush()
        return int(self.answer()["raylet"])

    def drain(self, raylet: int, seconds: float) -> None:
        """Give notice that a node will be taken away."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"drain {raylet} {seconds}\n")
        self.process.stdin.flush()
        said = self.answer()
        assert said["accepted"] == "True", said

    def ranks_of(self, raylet: int) -> list[int]:
        """Return the ranks that run under a raylet."""
        return [pid for pid in descendants(raylet) if is_rank(pid)]
