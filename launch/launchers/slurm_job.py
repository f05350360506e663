"""What runs in a Slurm job: one `srun` over all nodes, and whether the job goes back to the queue.

Slurm tells a job that its time is nearly over by SIGUSR1 (`--signal=B:USR1@...` in the script),
that it is preempted or cancelled by SIGTERM. Both go on to the tasks as SIGTERM, by way of
`scancel`: `srun` takes a SIGTERM of its own for the wish to kill its tasks ("forcing job
termination", in its sources and in every log of such an end). Ranks save and leave. Then the job is
put back where the run is not finished, unless it was cancelled, or a new start cannot help: because
the exit status says so, or because this start has saved nothing new though nobody cut it short.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from interlace.launch.launchers.supervising import (
    Process,
    ended,
    failure_of,
    newest_step,
    say,
)
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.exits import Exit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FIRST_PORT, PORTS = 20000, 20000


@dataclass
class Messenger:
    """Hands the first signal on to the tasks, as SIGTERM."""

    process: Process | None = None
    received: list[int] = field(default_factory=list[int])

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.received.append(number)
        if len(self.received) == 1 and self.process is not None:
            tell_tasks()


def main(words: Sequence[str]) -> int:
    """Run the job; return its exit status."""
    parser = argparse.ArgumentParser(prog="slurm_job")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--ranks-per-node", type=int, required=True, help="ranks of each node")
    parser.add_argument("--ray", action="store_true", help="start the ranks under Ray")
    parser.add_argument("words", nargs="+", help="recipe and overrides")
    job = parser.parse_args(words)
    store = CheckpointStore(job.run / "checkpoints")
    began, before = newest_step(store), store.live_attempt()
    messenger = Messenger()
    for number in SIGNALS:
        signal.signal(number, messenger.receive)
    token = make_token() if job.ray else None
    try:
        messenger.process = subprocess.Popen(
            [*srun_words(job.ray), *task_words(job)], env=environment(token)
        )
        if messenger.received:
            # It came before there were tasks, so there is nothing to save.
            messenger.process.terminate()
        status = ended(messenger.process.wait())
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    if is_finished(job.run):
        return Exit.DONE
    failure = failure_of(job.run, before, status)
    gained = newest_step(store) > began
    if signal.SIGUSR1 in messenger.received and not gained:
        say(
            "nothing new was saved within the time limit, and another start would end like this "
            "one: the job does not go back to the queue; type a longer --time, a --notice that is "
            "longer than a save takes, or a smaller checkpoint.every_steps="
        )
        return status or Exit.PREEMPTED
    stopped = bool(messenger.received) or status == 0
    if not stopped and not (failure.restartable and gained):
        say(f"{failure.line}; the job does not go back to the queue")
        return failure.status
    return back_to_queue()


def tell_tasks() -> None:
    """Send SIGTERM to every task of the job, but not to `srun`."""
    # Without --batch or --full it reaches the steps only, not this program.
    told = ["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]]
    if subprocess.run(told, check=False).returncode != 0:
        say("scancel did not reach the ranks: they go on until Slurm ends them")


def srun_words(ray: bool) -> list[str]:
    """Return how one task per node is started."""
    cores = os.environ.get("SLURM_CPUS_ON_NODE", "1")
    return [
        "srun",
        "--ntasks-per-node=1",
        # Without these a task has one core, whatever the job has.
        f"--cpus-per-task={cores}",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        # Nodes of Ray have no end of their own; ranks end together.
        f"--wait={10 if ray else 300}",
    ]


def task_words(job: argparse.Namespace) -> list[str]:
    """Return what every node runs."""
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    number = os.environ["SLURM_JOB_ID"]
    port = FIRST_PORT + int(number) % PORTS
    if job.ray:
        workers = ["--workers", str(nodes * job.ranks_per_node)]
        module = "interlace.launch.launchers.slurm_node"
        return [sys.executable, "-m", module, f"{head_node()}:{port}", *job.words, *workers]
    ranks = ["--nproc", str(job.ranks_per_node)]
    if nodes > 1:
        ranks += ["--nnodes", str(nodes), "--rdzv", f"{head_node()}:{port}"]
    launcher = [sys.executable, "-m", "interlace.launch.cli", "launch", "torchrun"]
    return [*launcher, *job.words, *ranks]


def head_node() -> str:
    """Return the first node of the job, where the others meet it."""
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()[0]


def make_token() -> Path:
    """Write a token for a Ray cluster of this job, in a file that only we can read; not into the
    run folder, which may be shared.
    """
    folder = Path.home() / ".interlace"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"slurm-{os.environ['SLURM_JOB_ID']}.token"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path


def environment(token: Path | None) -> dict[str, str]:
    """Return the environment of the tasks; the token goes by its path, never by value."""
    if token is None:
        return dict(os.environ)
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def is_finished(run_dir: Path) -> bool:
    """Whether all steps of a run are done and saved."""
    try:
        recipe = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    except OSError:
        return False
    steps = recipe.get("train", {}).get("steps")
    return steps is not None and newest_step(CheckpointStore(run_dir / "checkpoints")) >= steps


def back_to_queue() -> int:
    """Put the job back, unless it is being cancelled; return its exit status."""
    number = os.environ["SLURM_JOB_ID"]
    asked = ["squeue", "--noheader", "--format=%T", f"--jobs={number}"]
    state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if state not in ("RUNNING", ""):
        say(f"the job is {state}: the state is saved, and it does not go back to the queue")
        return Exit.DONE
    say("the run is not finished: the job goes back to the queue")
    done = subprocess.run(["scontrol", "requeue", number], check=False)
    if done.returncode != 0:
        say("Slurm did not take it back; submit the job again, and the run goes on")
        return Exit.PREEMPTED
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
