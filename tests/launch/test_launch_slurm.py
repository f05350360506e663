"""`interlace launch slurm`: the script, and a whole job under programs that stand for Slurm's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from interlace.launch.cli import main
from interlace.trainer.checkpoint.commit import CheckpointStore

SBATCH = """#!/bin/bash
# Keeps the script; the test plays the controller.
cp "$1" "$SPOOL/job.sh"
echo "Submitted batch job 4242"
"""
SRUN = """#!/bin/bash
# Starts one task per node, all here. Its own SIGTERM means to kill them ("forcing job
# termination"): srun hands on others, but not this one.
while [[ "$1" == --* ]]; do shift; done
trap 'echo "srun: forcing job termination"; kill -KILL "${tasks[@]}" 2>/dev/null' TERM
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do
    SLURM_STEP_ID=0 SLURM_PROCID=$task "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$SPOOL/tasks"
status=0
for task in "${tasks[@]}"; do
    # A trap ends `wait` early.
    while true; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
    ((code > status)) && status=$code
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then
    for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo localhost; done
else
    echo "$*" >> "$SPOOL/asked"
fi
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM 4242" ]] || exit 1
kill -TERM $(cat "$SPOOL/tasks")
"""
SQUEUE = """#!/bin/bash
cat "$SPOOL/state"
"""


class Cluster:
    """Slurm on this machine: its programs on PATH, and the controller's part in Python."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "SPOOL": str(folder),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"here[1-{nodes}]",
            "SLURM_CPUS_ON_NODE": str(os.cpu_count()),
        }
        programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
        programs["scancel"] = SCANCEL
        for name, text in programs.items():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        self.state = "RUNNING"

    @property
    def state(self) -> str:
        """What squeue says of the job."""
        return (self.folder / "state").read_text(encoding="utf-8").strip()

    @state.setter
    def state(self, text: str) -> None:
        (self.folder / "state").write_text(text + "\n", encoding="utf-8")

    def submit(self, *words: str) -> str:
        """Run `interlace launch slurm`; return the script that sbatch got."""
        command = [sys.executable, "-m", "interlace.launch.cli", "launch", "slurm", *words]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Submitted batch job 4242" in done.stdout
        return (self.folder / "job.sh").read_text(encoding="utf-8")

    def start(self) -> "subprocess.Popen[str]":
        """Start the job as slurmd does: the script, in a session of its own."""
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sh")],
            env=self.environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def terminate(self, job: "subprocess.Popen[str]") -> None:
        """Send SIGTERM to all of the job, as Slurm does when it is cancelled or preempted."""
        subprocess.run(["scancel", "--signal=TERM", "4242"], env=self.environment, check=True)
        job.send_signal(signal.SIGTERM)

    def requeued(self) -> int:
        """Return how often the job went back to the queue."""
        path = self.folder / "asked"
        return path.read_text(encoding="utf-8").count("requeue 4242") if path.exists() else 0


def committed(run: Path) -> list[int]:
    return CheckpointStore(run / "checkpoints").committed_steps()


def wait_for_a_checkpoint(run: Path, job: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 200
    while not committed(run):
        assert time.monotonic() < end
        assert job.poll() is None, job.stdout and job.stdout.read()
        time.sleep(0.05)


@pytest.mark.long
def test_a_job_saves_before_its_time_is_over_goes_back_to_the_queue_and_finishes(
    tiny: Sequence[str],
    interlace: Callable[..., "subprocess.CompletedProcess[str]"],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    cluster, short = Cluster(tmp_path, nodes=2), ("train.steps=15",)
    cluster.submit(*tiny, *short, "--nodes", "2", "--gpus-per-node", "0")
    run = tmp_path / "runs" / "fault-drill-0001"
    assert run.is_dir()
    with cluster.start() as job:
        wait_for_a_checkpoint(run, job)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert "finishing this step and saving" in said
    if committed(run)[-1] < 15:
        assert "the job goes back to the queue" in said
        assert cluster.requeued() == 1
        with cluster.start() as job:
            said, _ = job.communicate(timeout=200)
        assert job.returncode == 0, said
    assert committed(run)[-1] == 15
    assert cluster.requeued() == 1
    straight = tmp_path / "straight"
    done = interlace("train", *tiny, *short, f"run.dir={straight}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(run) == losses_of(straight)


def test_a_job_with_a_mistake_does_not_go_back_to_the_queue(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    missing = f"data.source={tmp_path}/missing.txt"
    cluster.submit(*tiny, missing, "--gpus-per-node", "0")
    with cluster.start() as job:
        said, _ = job.communicate(timeout=200)
    assert job.returncode == 2, said
    assert "does not go back to the queue" in said
    assert cluster.requeued() == 0


def test_a_job_that_is_cancelled_saves_and_does_not_go_back(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    cluster, run = Cluster(tmp_path, nodes=1), tmp_path / "run"
    cluster.submit(*tiny, "train.steps=100000", f"run.dir={run}", "--gpus-per-node", "0")
    with cluster.start() as job:
        wait_for_a_checkpoint(run, job)
        cluster.state = "COMPLETING"
        cluster.terminate(job)
        said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert "the job is COMPLETING: the state is saved" in said
    assert cluster.requeued() == 0


def test_a_job_whose_whole_time_brings_nothing_does_not_go_back_for_ever(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    cluster, run = Cluster(tmp_path, nodes=1), tmp_path / "run"
    cluster.submit(*tiny, f"run.dir={run}", "--gpus-per-node", "0")
    # Ranks that leave without having saved: there was no time.
    ranks = (
        "#!/bin/bash\ntrap 'exit 75' TERM\necho $$ > $SPOOL/tasks\nwhile :; do sleep 0.1; done\n"
    )
    (tmp_path / "srun").write_text(ranks, encoding="utf-8")
    with cluster.start() as job:
        while not (tmp_path / "tasks").exists():
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=200)
    assert job.returncode == 75, said
    assert "type a longer --time, a --notice that is longer than a save takes" in said
    assert cluster.requeued() == 0


@pytest.mark.long
def test_a_job_with_ray_has_a_cluster_of_its_own_that_leaves_nothing(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster, run = Cluster(tmp_path, nodes=1), tmp_path / "run"
    words = (*tiny, "train.steps=10", f"run.dir={run}", "--gpus-per-node", "0", "--ray")
    assert "--ray" in cluster.submit(*words)
    with cluster.start() as job:
        wait_for_a_checkpoint(run, job)
        (token,) = (tmp_path / ".interlace").iterdir()
        modes = [path.stat().st_mode & 0o777 for path in (token.parent, token)]
        secret = token.read_text(encoding="ascii")
        private = Path(f"/tmp/interlace-{os.getuid()}-4242")
        assert private.stat().st_mode & 0o777 == 0o700
        said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    assert modes == [0o700, 0o600]
    assert committed(run)[-1] == 10
    assert not token.exists()
    assert not private.exists()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert secret not in said
    assert not any(secret.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be 1 or more"),
        (["--time", "tomorrow"], "--time tomorrow: must be [D-]H:M:S"),
        (["--partition", "a b"], "--partition a b: must be letters"),
        (["--account", "x;y"], "--account x;y: must be letters"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: must be 0 or more"),
        (["run.dir=/a b"], "run.dir /a b: must be letters"),
    ],
)
def test_what_slurm_would_misread_is_refused(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", "quickstart", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_without_slurm_a_dry_run_is_proposed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", "quickstart"]) == 2
    said = capsys.readouterr().err
    assert "sbatch is not on this machine" in said
    assert "--dry-run" in said
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_the_log_goes_to_is_there_before_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(tmp_path, nodes=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOOL", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run = tmp_path / "new" / "one"
    assert main(["launch", "slurm", "quickstart", f"run.dir={run}"]) == 0
    script = (tmp_path / "job.sh").read_text(encoding="utf-8")
    assert f"#SBATCH --output={run}-slurm-%j.log" in script
    assert run.parent.is_dir()


def test_a_folder_is_not_taken_by_a_job_that_was_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses = tmp_path / "bin" / "sbatch"
    refuses.parent.mkdir()
    refuses.write_text("#!/bin/bash\nexit 3\n", encoding="utf-8")
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refuses.parent}{os.pathsep}{os.environ['PATH']}")
    assert main(["launch", "slurm", "quickstart"]) == 2
    assert "sbatch did not take the job (status 3)" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())
