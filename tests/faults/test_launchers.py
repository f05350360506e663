"""What becomes of a run whose launcher is killed, and of one in which every start fails."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ray_launch import steps_done, wait_until_gone

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.ends import attempts_of, first_failure
from interlace.trainer.exits import Exit

pytestmark = pytest.mark.faults
LAUNCH = [sys.executable, "-m", "interlace.launch.cli", "launch", "torchrun"]


def committed(run: Path) -> int:
    return max(CheckpointStore(run / "checkpoints").committed_steps(), default=0)


def processes_of(run: Path) -> list[int]:
    """Return every process that has the run's folder among its words."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"run.dir={run}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_e9_a_launcher_that_is_killed_leaves_no_rank_and_the_same_words_go_on(
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    record_fault: Callable[[str, int, float], None],
    tmp_path: Path,
) -> None:
    words = [*LAUNCH, *tiny, "train.steps=60", "--nproc", "2"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight, run = tmp_path / "straight", tmp_path / "run"
    undisturbed = subprocess.run(
        [*words, f"run.dir={straight}"], env=settings, capture_output=True, text=True, check=False
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    with subprocess.Popen([*words, f"run.dir={run}"], env=settings) as launcher:
        wait_until(lambda: committed(run) >= 5, 200)
        launcher.kill()
        killed = time.time()
    acknowledged = committed(run)
    # Ranks hear of it from the kernel, finish their step and save.
    wait_until(lambda: processes_of(run) == [], 30)
    saved, taken = committed(run), steps_done(run)
    assert acknowledged <= saved < 60
    again = subprocess.Popen(
        [*words, f"run.dir={run}"], env=settings, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: steps_done(run) > taken, 200)
    recovered = time.time() - killed
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"resumed from the checkpoint of step {saved}" in said
    assert losses_of(run) == losses_of(straight)
    record_fault("launcher killed, started again by hand", taken - saved, recovered)


def test_e1_when_a_rank_of_one_machine_is_killed_the_launchers_of_both_start_again(
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    record_fault: Callable[[str, int, float], None],
    tmp_path: Path,
) -> None:
    words = [*LAUNCH, *tiny, "train.steps=60"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight, run = tmp_path / "straight", tmp_path / "run"
    undisturbed = subprocess.run(
        [*words, f"run.dir={straight}", "--nproc", "2"], env=settings, check=False
    )
    assert undisturbed.returncode == 0
    # Two machines, as far as the launchers know.
    meet = ["--nproc", "1", "--nnodes", "2", "--rdzv", f"localhost:{free_port()}"]
    machines = [
        subprocess.Popen(
            [*words, f"run.dir={run}", *meet], env=settings, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    wait_until(lambda: committed(run) >= 5, 200)
    first, victim = (
        next(process for process in processes_of(run) if is_rank(process, rank)) for rank in (0, 1)
    )
    os.kill(victim, signal.SIGKILL)
    killed = time.time()
    # Until it notices, the other one goes on.
    wait_until_gone([first], 60)
    taken = steps_done(run)
    wait_until(lambda: steps_done(run) > taken, 300)
    recovered = time.time() - killed
    said = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert losses_of(run) == losses_of(straight)
    again = [re.findall(r"start 1 of 3 from step (\d+)", text) for text in said]
    assert again[0] == again[1] != [], said
    assert not any("Traceback" in text for text in said), "\n---\n".join(said)
    record_fault("rank killed on one of two machines", taken - int(again[0][0]), recovered)


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def is_rank(process: int, rank: int) -> bool:
    """Whether a process is this rank: not its launcher, nor one that it has started."""
    with contextlib.suppress(OSError):
        said = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        settings = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return b"interlace.launch.torchrun" in said[:4] and f"RANK={rank}".encode() in settings
    return False


@pytest.mark.parametrize(
    ("restarts", "status"),
    # The launcher's own budget comes first, or the rule that every launcher obeys.
    [(2, 128 + signal.SIGKILL), (9, int(Exit.NO_PROGRESS))],
)
def test_e10_when_every_start_fails_pauses_grow_and_there_is_an_end(
    restarts: int, status: int, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [*LAUNCH, *tiny, f"run.dir={run}", "--max-restarts", str(restarts)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "INTERLACE_FAILPOINT": "step.forward@3:kill"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == status, done.stderr
    tried = min(restarts, 3)
    pauses = [int(seconds) for seconds in re.findall(r"from step 0 in (\d+) s", done.stderr)]
    assert pauses == [1, 2, 4][:tried]
    assert len(attempts_of(run)) == tried + 1
    end = first_failure(run)
    assert end is not None
    record = run / "ends" / f"attempt-{tried + 1}" / "rank-0.json"
    assert json.loads(record.read_text(encoding="utf-8"))["kind"] == end.kind
    assert committed(run) == 0


def test_c5_memory_that_runs_out_again_ends_the_launch_after_one_more_try(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [*LAUNCH, *tiny, f"run.dir={run}", "--max-restarts", "9"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "INTERLACE_FAILPOINT": "step.forward@3:nomem"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == Exit.MEMORY, done.stderr
    assert re.findall(r"start (\d) of 9 from step 0", done.stderr) == ["1"]
    assert attempts_of(run) == [1, 2]
