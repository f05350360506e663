"""Starts the ranks of one contender as processes of their own, and ends them whatever they do.

Every rank leads a session: what it starts stays in it, also compilers, which `ninja` puts into
process groups of their own. After a crash, a hang or Ctrl-C all of that goes, and none of it is
taken along into the next measurement.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

RANK_SCRIPT = HERE / "race_rank.py"
POLL_SECONDS = 0.05
OLD_SECONDS = 20.0
"""After which a lock is of a process that is gone, unless somebody compiles beside it."""


@dataclass
class Ended:
    """How the ranks of one contender ended.

    Attributes:
        findings: What each rank wrote, in their order; empty where it failed.
        error: Why it failed, in a line; empty where it did not.
        seconds: It took.
    """

    findings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    error: str = ""
    seconds: float = 0.0


def run_ranks(words: Sequence[str], folder: Path, ranks: int, timeout: float) -> Ended:
    """Run `race_rank.py` on so many ranks.

    Args:
        words: Of its command line.
        folder: Empty or not there; gets logs and findings of the ranks.
        ranks: How many.
        timeout: Seconds after which all of them are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            processes.append(started(words, folder, rank, ranks))
        error = watched(processes, folder, start + timeout)
    finally:
        killed(processes)
    seconds = time.monotonic() - start
    if error == TIMED_OUT:
        error = f"{TIMED_OUT} after {timeout:.0f} s"
    if error:
        return Ended(error=error, seconds=seconds)
    return Ended([finding_of(folder, rank) for rank in range(ranks)], seconds=seconds)


TIMED_OUT = "killed"


def started(words: Sequence[str], folder: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    """Start one rank in a session of its own."""
    log = (folder / f"rank-{rank}.log").open("wb")
    with log:
        return subprocess.Popen(
            [sys.executable, str(RANK_SCRIPT), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(rank, ranks),
            start_new_session=True,
        )


def environment(rank: int, ranks: int) -> dict[str, str]:
    """Return the variables of one rank: torchrun's, its share of the cores as threads, and where
    this project is.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": path,
        # What is freed in one size is to be there for another: models fill the device.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return {**os.environ, **{name: str(value) for name, value in words.items()}}


def watched(processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> str:
    """Wait until all ranks have ended or one has failed; return why, or nothing."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return reason(folder, rank, code)
        if all(code == 0 for code in codes):
            return ""
        if time.monotonic() > deadline:
            return TIMED_OUT
        free_old_locks()
        time.sleep(POLL_SECONDS)


def free_old_locks() -> None:
    """Delete the locks of what DeepSpeed compiles that were left by processes which were killed:
    everybody would wait for them for ever.
    """
    usual = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", usual))
    for lock in folder.glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > OLD_SECONDS and not works_in(lock.parent):
                lock.unlink()


def works_in(folder: Path) -> bool:
    """Whether some process has this working folder, as compilers have."""
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if path.readlink() == folder:
                return True
    return False


def killed(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill all processes of the sessions that these lead, and wait for the leaders."""
    sessions = {process.pid for process in processes}
    # A session keeps its number for as long as it has members; no other can have it meanwhile.
    while members := [pid for pid in running() if session_of(pid) in sessions]:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.wait()


def running() -> list[int]:
    """Return the processes of this machine that have not ended."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The state follows the name, which may contain anything, in parentheses.
            facts = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2]
            if facts.split()[0] != "Z":
                found.append(int(path.parent.name))
    return found


def session_of(pid: int) -> int:
    """Return a process's session; 0 where the process is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def reason(folder: Path, rank: int, code: int) -> str:
    """Return why a rank failed: what it wrote, else how it ended."""
    with contextlib.suppress(OSError, ValueError):
        written = finding_of(folder, rank)["error"]
        if written:
            return str(written)
    if code < 0:
        name = signal.Signals(-code).name
        return f"rank {rank} was ended by {name}" + (" (out of memory?)" if code == -9 else "")
    log = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"rank {rank} ended with status {code}"


def finding_of(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank wrote."""
    return json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
