"""Killed anywhere: nothing broken is visible, nothing acknowledged is lost, and no loss differs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from drill import Drill
from invariants import assert_invariants

from interlace.trainer.checkpoint import CheckpointStore, verify_step
from interlace.trainer.exits import Exit

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
RecordFault = Callable[[str, int, float], None]

VISITS = {
    "load.mid": 2,
    "manifest.half": 2,
    "manifest.open": 2,
    "manifest.post_rename": 2,
    "manifest.pre": 2,
    "manifest.pre_fsync": 2,
    "persist.half": 7,
    "persist.open": 2,
    "persist.post_rename": 3,
    "persist.pre_fsync": 2,
    "publish.post_rename": 3,
    "publish.pre_rename": 2,
    "retain.mid": 2,
    "snap.begin": 2,
    "snap.chunk": 7,
    "step.backward": 13,
    "step.forward": 6,
    "step.loss": 12,
    "step.update": 11,
}
"""Every failpoint, and the visit of it at which ranks stop: a step or a save in the middle."""

MAIN_ONLY = ("manifest.", "publish.", "retain.")
"""Points that only rank 0 comes by."""

VICTIMS = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}

QUICK = (("persist.half", "rank 1"), ("publish.pre_rename", "rank 0"))
"""What stands for the sweep in `make test`."""


def sweep() -> list[object]:
    """Return every failpoint with every choice of victims; all but a few are marked."""
    return [
        pytest.param(
            point,
            victims,
            marks=() if (point, victims) in QUICK else pytest.mark.faults,
            id=f"{point}-{victims.replace(' ', '')}",
        )
        for point in VISITS
        for victims in VICTIMS
    ]


@pytest.mark.parametrize(("point", "victims"), sweep())
def test_a1_two_ranks_killed_at_a_failpoint_go_on_bit_for_bit(
    point: str, victims: str, drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    """Whoever comes by the point stops there; then the victims are killed and the others go on."""
    broken = drill()
    if point == "load.mid":
        broken.start(2, "step.update@9:kill", (0, 1)).wait()
    stopped = (0,) if point.startswith(MAIN_ONLY) else (0, 1)
    attempt = broken.start(2, f"{point}@{VISITS[point]}:stop", stopped)
    attempt.wait_until_stopped(*stopped)
    attempt.kill(*VICTIMS[victims])
    attempt.signal(signal.SIGCONT)
    codes = attempt.wait()
    assert all(codes[rank] == -signal.SIGKILL for rank in VICTIMS[victims])
    assert 0 not in codes, attempt.printed()
    recovery = broken.finish(2)
    judge(broken, 2)
    # While one checkpoint is written training goes on, at most to where the next one is due.
    assert recovery.lost_steps <= 2 * 5
    record_fault(f"killed at a failpoint, {victims} of 2", recovery.lost_steps, recovery.seconds)


def test_a1_every_failpoint_is_swept() -> None:
    from interlace.trainer.checkpoint.failpoints import FAILPOINTS

    assert set(VISITS) == FAILPOINTS


@pytest.mark.faults
def test_a2_ranks_killed_at_random_times_go_on_bit_for_bit(
    drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    """One kill after the other, in as many runs as it takes, until all were tried."""
    choice = random.Random(20_260_102)
    words = ("checkpoint.every_steps=2",)
    broken = drill(*words)
    broken.start(2)
    began = time.monotonic()
    broken.follow()
    broken.attempts[-1].wait()
    longest_seconds = time.monotonic() - began
    drills = [broken]
    killed = 0
    while killed < 30:
        if broken.attempts[-1].ranks[0].code == 0:
            judge(broken, 2)
            broken = drill(*words)
            drills.append(broken)
        attempt = broken.start(2)
        victims = choice.choice(list(VICTIMS.values()))
        if not broken.follow(choice.uniform(0.0, longest_seconds)):
            attempt.kill(*victims)
            killed += 1
        if any(attempt.wait()):
            assert_invariants(broken)
    broken.finish(2)
    judge(broken, 2)
    for recovery in (recovery for tried in drills for recovery in tried.recoveries()):
        record_fault("killed at a random time, 2 ranks", recovery.lost_steps, recovery.seconds)


@pytest.mark.faults
def test_a3_500_kills_of_the_commit_layer_alone_lose_nothing(quick_home: Path, root: Path) -> None:
    """The trials that test_commit_kills.py makes 300 of, with another seed."""
    program = root / "tests" / "trainer" / "checkpoint" / "commit_kill_trials.py"
    home = quick_home / "commit-layer"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), str(home), "500", "20260103"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["problems"] == []
    assert sum(summary["killed"].values()) == 500


@pytest.mark.parametrize(
    "point", ["persist.half", pytest.param("step.forward", marks=pytest.mark.faults)]
)
def test_a4_killed_at_the_same_place_at_every_start_a_run_stops_and_says_why(
    point: str, drill: MakeDrill
) -> None:
    """Whoever starts it again says so, as launchers do; started by hand it may try once more."""
    broken = drill()
    again = {"INTERLACE_RESTART": "1"}
    for number in range(3):
        attempt = broken.start(1, point, environment=again if number else {})
        assert attempt.wait() == [-signal.SIGKILL], attempt.printed()
    for _ in range(2):
        attempt = broken.start(1, point, environment=again)
        assert attempt.wait() == [Exit.NO_PROGRESS], attempt.printed()
        assert "attempt 3" in attempt.printed()
    checkpoints = broken.run / "checkpoints"
    left = [path for name in ("inflight", "trash") for path in (checkpoints / name).iterdir()]
    assert len(left) <= 1
    assert_invariants(broken)
    broken.finish(1)
    assert_invariants(broken)


def test_a7_a_load_that_fails_in_the_middle_trains_nothing(drill: MakeDrill, judge: Judge) -> None:
    broken = drill()
    broken.start(1, "step.update@13:kill").wait()
    lines = (broken.run / "metrics.jsonl").read_text(encoding="utf-8")
    failed = broken.start(1, "load.mid@7:raise")
    assert failed.wait() == [Exit.DEFECT]
    assert "FailpointHit: load.mid" in failed.printed()
    assert (broken.run / "metrics.jsonl").read_text(encoding="utf-8") == lines
    broken.finish(1)
    assert broken.attempts[-1].resumed_step() == 10
    judge(broken, 1)


@pytest.mark.faults
def test_a8_killed_in_retention_again_and_again_the_newest_two_stay(
    drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    broken = drill("checkpoint.every_steps=1", "train.steps=50")
    store = CheckpointStore(broken.run / "checkpoints")
    for number in range(20):
        codes = broken.start(1, f"retain.mid@{number % 3 + 1}:kill").wait()
        assert codes == [-signal.SIGKILL], broken.attempts[-1].printed()
        assert_invariants(broken)
        steps = store.committed_steps()
        assert steps[-2:] == [steps[-1] - 1, steps[-1]]
        assert all(not verify_step(store.folder, step).problems for step in steps)
    recovery = broken.finish(1)
    judge(broken, 1)
    record_fault("killed while old checkpoints go", recovery.lost_steps, recovery.seconds)
