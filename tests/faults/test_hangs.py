"""Ranks that hang or dawdle: noticed, told apart from those that wait, ended, and made good."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from drill import Drill
from ranks import run_on_ranks
from watched_ranks import rank, two_ranks

from interlace.trainer.ends import ends_of, first_failure
from interlace.trainer.exits import Exit

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
RecordFault = Callable[[str, int, float], None]
Interlace = Callable[..., subprocess.CompletedProcess[str]]

WATCHED = "watchdog.seconds=10"
"""Long enough for a machine that has much else to do."""

PLACES = {"step.forward": 13, "step.backward": 13, "step.update": 13}
"""Where a rank hangs, always in step 13: after the save of step 10 has long been over."""


def hangs(drill: MakeDrill, judge: Judge, where: str, action: str) -> tuple[str, int, float]:
    """Let rank 1 of two hang, start again, and hold the run to the undisturbed one.

    Returns:
        What the start that hung printed, lost steps, seconds to the first new step.
    """
    broken = drill(WATCHED)
    attempt = broken.start(2, f"{where}@{PLACES[where]}:{action}", victims=(1,))
    codes = attempt.wait()
    printed = attempt.printed()
    assert codes == [Exit.STALLED, -9], printed
    kinds = {end.rank: end.kind for end in ends_of(broken.run, 1)}
    assert kinds == {0: "waiting", 1: "stalled"}
    recovery = broken.finish(2)
    judge(broken, 2)
    return printed, recovery.lost_steps, recovery.seconds


@pytest.mark.faults
@pytest.mark.parametrize("where", list(PLACES))
def test_e5_a_stopped_rank_is_named_and_the_run_recovers_bit_for_bit(
    where: str, drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    printed, lost, seconds = hangs(drill, judge, where, "stop")
    phase = where.removeprefix("step.")
    assert printed.count("the run stands still") == 1
    named = rf"rank 1 has been in {phase} of step 13 for \d+ s on \S+, stopped by a signal"
    assert re.search(named, printed), printed
    assert re.search(r"rank 0 waits for it in \w+ of step 1[34]", printed), printed
    assert "rank 1: no Python stack; a stopped process cannot show one" in printed
    assert "torch/distributed/" in printed
    record_fault("rank stopped (SIGSTOP)", lost, seconds)


@pytest.mark.faults
@pytest.mark.parametrize("where", ["step.forward", "step.backward"])
def test_e6_a_rank_that_hangs_and_keeps_the_lock_is_killed_and_the_run_recovers(
    where: str, drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    printed, lost, seconds = hangs(drill, judge, where, "hang")
    phase = where.removeprefix("step.")
    assert f"rank 1 has been in {phase} of step 13" in printed
    assert "interlace/trainer/checkpoint/failpoints.py" in printed
    record_fault("rank hangs and keeps the interpreter's lock", lost, seconds)


@pytest.mark.faults
@pytest.mark.parametrize("action", ["stop", "hang"])
def test_e5_torchrun_starts_the_ranks_again_by_itself(
    action: str,
    interlace: Interlace,
    short: Sequence[str],
    tmp_path: Path,
    losses_of: Callable[[Path], list[str]],
) -> None:
    words = [*short, "checkpoint.every_steps=10", "train.validate_every_steps=20", WATCHED]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = interlace("train", *words, f"run.dir={straight}", ranks=2)
    assert done.returncode == 0, done.stderr
    # The second start has 10 steps to do, so it does not come by the 16th visit.
    armed = {"INTERLACE_FAILPOINT": f"step.backward@16:{action}", "INTERLACE_FAILPOINT_RANK": "1"}
    environment = {"PET_MAX_RESTARTS": "1", **armed}
    done = interlace("train", *words, f"run.dir={broken}", ranks=2, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step 10" in done.stdout
    assert losses_of(broken) == losses_of(straight)


def test_a_single_process_that_hangs_ends_with_the_status_of_a_stall(drill: MakeDrill) -> None:
    broken = drill("watchdog.seconds=4")
    attempt = broken.start(1, "step.backward@13:stop")
    assert attempt.wait() == [-9]
    assert re.search(r"the run has been in backward of step 13 for \d+ s", attempt.printed())
    end = first_failure(broken.run)
    assert end is not None
    assert (end.kind, end.status) == ("stalled", Exit.STALLED)


def slow_ranks(run: Path) -> list[int]:
    """Return the ranks that the run's metrics name as slow, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [int(record["straggler"]) for record in records if "straggler" in record]


@pytest.mark.faults
def test_e7_a_slow_rank_is_named_within_ten_steps_and_once(drill: MakeDrill) -> None:
    slow = drill("train.steps=40", "watchdog.straggler_factor=2.0")
    attempt = slow.start(2, "step.forward@*:burn", victims=(1,))
    assert attempt.wait() == [0, 0], attempt.printed()
    assert attempt.printed().count("rank 1 is slow") == 1
    assert re.search(r"step (10|11): rank 1 is slow", attempt.printed()), attempt.printed()
    assert slow_ranks(slow.run) == [1]


@pytest.mark.faults
def test_e7_two_hundred_clean_steps_name_nobody(drill: MakeDrill) -> None:
    clean = drill("train.steps=200", "checkpoint.every_steps=100", "train.validate_every_steps=100")
    clean.finish(2)
    assert "is slow" not in clean.attempts[-1].printed()
    assert slow_ranks(clean.run) == []


def test_no_collective_waits_longer_for_a_rank_than_it_was_told(tmp_path: Path) -> None:
    script = """
import time
from datetime import timedelta
import torch
from interlace.trainer.world import limit_waiting, process_group
with process_group() as world:
    world.barrier()
    limit_waiting(world, timedelta(seconds=2))
    if world.rank == 0:
        start = time.monotonic()
        try:
            world.sum(torch.ones(1))
        except RuntimeError as error:
            print("waited", time.monotonic() - start < 60, str(error)[-80:], flush=True)
        open("over", "w").close()
    else:
        import pathlib
        while not pathlib.Path("over").exists():
            time.sleep(0.1)
    import os
    os._exit(0)
"""
    done = run_on_ranks(script, tmp_path)
    assert "waited True" in done.stdout, done.stdout + done.stderr
    assert "Timed out" in done.stdout or "Timed out" in done.stderr or "2000ms" in done.stdout


@pytest.mark.faults
def test_a_slow_rank_that_takes_too_long_ends_the_run(tmp_path: Path) -> None:
    codes, printed = two_ranks(tmp_path, peer_sleeps=600.0)
    assert codes == [Exit.STALLED, Exit.STALLED], printed
    assert printed.count("the run stands still") == 1
    assert "rank 1 has been in publish of step 3" in printed
    kinds = {end.rank: end.kind for end in ends_of(tmp_path, 1)}
    assert kinds == {0: "waiting", 1: "stalled"}


@pytest.mark.faults
def test_time_in_which_the_watcher_could_not_run_does_not_count(tmp_path: Path) -> None:
    done = rank(
        tmp_path,
        "beats = range(100)\n"
        "for _ in beats:\n    watch.heartbeat.beat(); time.sleep(0.05)\n"
        "os.kill(watch.process.pid, signal.SIGSTOP); time.sleep(5)\n"
        "os.kill(watch.process.pid, signal.SIGCONT); time.sleep(0.7)\n"
        "for _ in beats:\n    watch.heartbeat.beat(); time.sleep(0.05)\n"
        "watch.close()\n",
        seconds=3,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
