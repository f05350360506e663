"""Ranks that do nothing but mark phases under a watcher: no torch, so they start in no time."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 120
"""Seconds for a process that takes one on a quiet machine."""

RANK = """
import os, signal, sys, time
from pathlib import Path
from interlace.trainer.watchdog.watch import Watch
watch = Watch(Path(sys.argv[1]), 1, 0, 1, float(sys.argv[2]))
for phase in ("data", "exchange", "data", "exchange", "update"):
    watch.heartbeat.enter(phase, 3)
print(watch.process.pid, flush=True)
"""


def rank(folder: Path, rest: str, seconds: float = 0.5) -> subprocess.CompletedProcess[str]:
    """Run a rank that does nothing but what `rest` says, after two steps."""
    return subprocess.run(
        [sys.executable, "-c", RANK + rest, str(folder), str(seconds)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PLANTED_TOKEN": "not-to-be-written-down"},
    )


@contextmanager
def hung_rank(folder: Path) -> Generator["subprocess.Popen[bytes]"]:
    """Start a rank that marks two steps and then nothing; its error output is a pipe."""
    command = [sys.executable, "-c", RANK + "time.sleep(600)", str(folder), "0.5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


PEERS = """
import os, sys, time
from pathlib import Path
from interlace.trainer.watchdog.watch import Watch
rank, peer_sleeps = int(sys.argv[2]), float(sys.argv[3])
watch = Watch(Path(sys.argv[1]), 1, rank, 2, 1.0)
for phase in ("data", "exchange", "data", "exchange", "norm"):
    watch.heartbeat.enter(phase, 3)
if rank == 1:
    # A slow phase: ten seconds are allowed.
    watch.heartbeat.enter("publish")
    time.sleep(peer_sleeps)
    Path(sys.argv[1], "done").touch()
else:
    watch.heartbeat.enter("update")
    watch.heartbeat.enter("exchange")
    while not Path(sys.argv[1], "done").exists():
        time.sleep(0.05)
watch.close()
"""


def two_ranks(folder: Path, peer_sleeps: float) -> tuple[list[int], str]:
    """Let rank 0 wait for rank 1, which takes its time; return statuses and what they printed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PEERS, str(folder), str(rank), str(peer_sleeps)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], "".join(printed)
