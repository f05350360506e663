"""`interlace launch torchrun`: the same losses as by any other start, and what happens after a
failure, a signal and a mistake.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from interlace.launch.cli import build_parser, parse
from interlace.launch.launchers.supervising import Budget
from interlace.launch.launchers.torchrun import PORTS, ranks_of
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.exits import Exit

Losses = Callable[[Path], list[str]]


@contextlib.contextmanager
def launched(*words: str, cwd: Path) -> Iterator["subprocess.Popen[str]"]:
    """A launcher that runs; whatever is left of it is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "interlace.launch.cli", "launch", "torchrun", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        for rank in ranks_of_run(words):
            os.kill(rank, signal.SIGKILL)
        process.communicate()


def ranks_of_run(words: Sequence[str]) -> list[int]:
    """Return the processes of a run's ranks, in order of rank."""
    (folder,) = (word for word in words if word.startswith("run.dir="))
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (process / "cmdline").read_bytes().decode().split("\0")
            if "interlace.launch.torchrun" in said[:4] and folder in said:
                settings = (process / "environ").read_bytes().decode().split("\0")
                (rank,) = (each for each in settings if each.startswith("RANK="))
                found[int(rank.partition("=")[2])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def wait_until(true: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    """Wait for something that happens soon on a quiet machine."""
    end = time.monotonic() + 200
    while not true():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


def committed(run: Path) -> list[int]:
    return CheckpointStore(run / "checkpoints").committed_steps()


@pytest.fixture(scope="module")
def straight(
    tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory, interlace: Callable[..., object]
) -> Path:
    """An undisturbed run of 20 steps on two ranks."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = interlace("launch", "torchrun", *tiny, *SHORT, f"run.dir={run}", "--nproc", "2")
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    assert f"2 ranks on this machine, run folder {run}" in done.stderr
    return run


SHORT = ("train.steps=20",)


def test_the_same_recipe_gives_the_same_losses_however_it_is_started(
    straight: Path,
    tiny: Sequence[str],
    interlace: Callable[..., "subprocess.CompletedProcess[str]"],
    losses_of: Losses,
    tmp_path: Path,
) -> None:
    plain = interlace("train", *tiny, *SHORT, f"run.dir={tmp_path / 'plain'}", ranks=2)
    alone = interlace("train", *tiny, *SHORT, f"run.dir={tmp_path / 'alone'}")
    assert (plain.returncode, alone.returncode) == (0, 0), plain.stderr + alone.stderr
    assert losses_of(straight) == losses_of(tmp_path / "plain")
    both = zip(losses_of(straight), losses_of(tmp_path / "alone"), strict=True)
    assert all(abs(float.fromhex(a) - float.fromhex(b)) <= 1e-5 for a, b in both)


def test_after_a_rank_was_killed_all_start_again_and_the_losses_are_the_same(
    straight: Path, tiny: Sequence[str], losses_of: Losses, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *SHORT, f"run.dir={run}", "--nproc", "2")
    with launched(*words, cwd=tmp_path) as process:
        wait_until(lambda: bool(committed(run)), process)
        ranks = ranks_of_run(words)
        first, second = (os.sched_getaffinity(rank) for rank in ranks)
        # Each has its own cores, where there are two.
        assert not first & second or len(os.sched_getaffinity(0)) < 2
        os.kill(ranks[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert "rank 1: ended without a word" in said
    assert "start 1 of 3 from step" in said
    assert "Traceback" not in said
    assert said.count("Traceback") == 0, said
    assert losses_of(run) == losses_of(straight)


@pytest.mark.long
def test_sigterm_reaches_every_rank_once_and_the_run_goes_on_later(
    straight: Path,
    tiny: Sequence[str],
    interlace: Callable[..., "subprocess.CompletedProcess[str]"],
    losses_of: Losses,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *SHORT, f"run.dir={run}", "--nproc", "2")
    with launched(*words, cwd=tmp_path) as process:
        wait_until(lambda: bool(committed(run)), process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert "finishing this step and saving" in said
    assert committed(run)[-1] < 20
    more = interlace("launch", "torchrun", "--resume", str(run), "--nproc", "2")
    assert more.returncode == 0, more.stderr
    assert losses_of(run) == losses_of(straight)


def test_a_mistake_is_told_once_and_not_repeated(
    tiny: Sequence[str],
    interlace: Callable[..., "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
) -> None:
    words = (*tiny, "train.tokens_per_step=96", f"run.dir={tmp_path / 'run'}")
    done = interlace("launch", "torchrun", *words, "--nproc", "2")
    assert done.returncode == 2
    assert done.stderr.count("train.tokens_per_step=96") == 1, done.stderr
    assert "start 1 of" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_budget_is_for_starts_in_a_row_that_bring_nothing() -> None:
    budget = Budget(limit=2, step=0)
    pauses = [budget.pause(step, Exit.DEFECT) for step in (0, 5, 5, 5)]
    assert pauses == [1.0, 1.0, 2.0, None]
    assert Budget(limit=0, step=0).pause(0, Exit.DEFECT) is None
    patient = Budget(limit=100, step=0)
    assert max(filter(None, (patient.pause(0, Exit.DEFECT) for _ in range(20)))) == 60.0


def wanted(*words: str) -> list[str]:
    """Return torchrun's words of the second start of two machines."""
    arguments = parse(build_parser(), ["launch", "torchrun", "quickstart", *words])
    recipe = load_recipe("quickstart", arguments.overrides)
    return ranks_of(arguments, recipe).words(1)


def test_machines_meet_at_another_port_at_every_start(tmp_path: Path) -> None:
    words = wanted(f"run.dir={tmp_path}/x", "--nproc", "4", "--nnodes", "2", "--rdzv", "node1:2900")
    assert words[:5] == [
        "--nproc-per-node=4",
        "--nnodes=2",
        "--rdzv-endpoint=node1:2901",
        "--rdzv-id=x-1",
        "--rdzv-backend=c10d",
    ]
    assert words[5:] == ["-m", "interlace.launch.torchrun", "quickstart", *words[8:]]
    assert words[-1] == f"run.dir={tmp_path}/x"
    assert PORTS == 16
    more = ("--nnodes", "2", "--rdzv", "node1:2900", "--node-rank", "1")
    numbered = wanted(f"run.dir={tmp_path}/x", "--nproc", "4", *more)
    assert numbered[4:6] == ["--rdzv-backend=static", "--node-rank=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "--nproc 0: must be a number of ranks, gpu or auto"),
        (["--nproc", "gpu"], "there is no GPU that torch can use; type --nproc and a number"),
        (["--nnodes", "0"], "--nnodes 0: must be 1 or more"),
        (["--nnodes", "2", "--rdzv", "a:1"], "type run.dir= and a folder that all of them see"),
        (["--nnodes", "2", "run.dir=/x"], "type --rdzv HOST:PORT"),
        (["--nnodes", "2", "--rdzv", "here"], "--rdzv here: cannot be read; type HOST:PORT"),
        (["--rdzv", "a:1"], "--rdzv a:1: one machine meets nobody"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: must be from 0 to 1"),
        (["--max-restarts", "-1"], "--max-restarts -1: must be 0 or more"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError) as refused:
        wanted(*words)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []
