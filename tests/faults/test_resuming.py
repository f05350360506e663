"""Wherever a run is stopped, and on however many ranks it goes on: the same state, rows and losses.

Randomness (D2) is in test_energy.py, whose model draws noise; offloaded state on other ranks in
test_offloaded_runs.py.
"""

import json
import random
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

import pytest
import torch
from digests import stored_digest
from drill import Drill
from invariants import assert_invariants, bits

from interlace.trainer.checkpoint import CheckpointStore

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
StraightRun = Callable[..., Path]
RecordFault = Callable[[str, int, float], None]


def losses(run: Path) -> torch.Tensor:
    """Losses of all steps, float64."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize(
    ("ranks", "stops"),
    [
        pytest.param(1, (1, 4, 5), id="1-rank"),
        pytest.param(1, range(1, 20), id="1-rank-everywhere", marks=pytest.mark.faults),
        pytest.param(2, (2, 5, 8, 9, 16), id="2-ranks", marks=pytest.mark.faults),
        pytest.param(4, (3, 11), id="4-ranks", marks=pytest.mark.faults),
    ],
)
def test_d1_stopped_after_any_step_a_run_goes_on_bit_for_bit(
    ranks: int,
    stops: Sequence[int],
    drill: MakeDrill,
    judge: Judge,
    record_fault: RecordFault,
) -> None:
    broken, done = drill(), 0
    for stop in stops:
        attempt = broken.start(ranks, f"step.forward@{stop - done}:sigterm")
        broken.follow()
        assert attempt.wait() == [0] * ranks, attempt.printed()
        assert broken.steps_done() == stop
        done = stop
    broken.finish(ranks)
    judge(broken, ranks)
    assert [recovery.lost_steps for recovery in broken.recoveries()] == [0] * len(stops)
    for recovery in broken.recoveries():
        record_fault(f"SIGTERM, {ranks} ranks", recovery.lost_steps, recovery.seconds)


def test_e8_a_second_signal_in_the_middle_of_a_commit_ends_at_once_and_spoils_nothing(
    drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    broken = drill()
    attempt = broken.start(1, "publish.pre_rename@2:stop")
    attempt.wait_until_stopped(0)
    # Both wait for it to go on: neither the rename nor the step is finished between them.
    attempt.signal(signal.SIGINT)
    attempt.signal(signal.SIGTERM)
    attempt.signal(signal.SIGCONT)
    assert attempt.wait() == [128 + signal.SIGTERM], attempt.printed()
    assert CheckpointStore(broken.run / "checkpoints").committed_steps() == [5]
    recovery = broken.finish(1)
    assert broken.attempts[-1].resumed_step() == 5
    judge(broken, 1)
    record_fault("two signals while committing", recovery.lost_steps, recovery.seconds)


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param((2, 1), id="2-1"),
        pytest.param((4, 2, 1, 4), id="4-2-1-4", marks=pytest.mark.faults),
        pytest.param((1, 2, 4, 1), id="1-2-4-1", marks=pytest.mark.faults),
    ],
)
def test_d3_another_number_of_ranks_goes_on_with_the_same_state_and_rows(
    ranks: Sequence[int],
    drill: MakeDrill,
    straight_run: StraightRun,
    record_fault: RecordFault,
) -> None:
    moved = drill()
    store = CheckpointStore(moved.run / "checkpoints")
    part, stored = 20 // len(ranks), ""
    for number, count in enumerate(ranks):
        found, rows = moved.home / f"digest-{number}", str(moved.home / f"rows-{number}")
        last = number == len(ranks) - 1
        attempt = moved.start(
            count,
            None if last else f"step.forward@{part}:sigterm",
            hooks=lambda rank, found=found, rows=rows: {"digest": str(found), "rows": rows},
        )
        moved.follow()
        assert attempt.wait() == [0] * count, attempt.printed()
        if number:
            assert found.read_text(encoding="utf-8") == stored
        step = store.committed_steps()[-1]
        assert step == (20 if last else part * (number + 1))
        stored = stored_digest(moved.run, step)
    assert_invariants(moved)
    expected = losses(straight_run(ranks[0]))
    torch.testing.assert_close(losses(moved.run), expected, rtol=0, atol=1e-5)
    for number in range(1, len(ranks)):
        first = part * number
        torch.testing.assert_close(losses(moved.run)[first], expected[first], rtol=0, atol=1e-6)
    assert rows_of(moved, "rows-*") == rows_of_straight(drill)
    for recovery in moved.recoveries():
        record_fault("another number of ranks", recovery.lost_steps, recovery.seconds)


def rows_of(drill: Drill, pattern: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Return source and row of every (step, number) that any rank of a drill has read."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for path in sorted(drill.home.glob(pattern)):
        for line in path.read_text(encoding="utf-8").splitlines():
            step, number, source, row = map(int, line.split())
            assert found.setdefault((step, number), (source, row)) == (source, row)
    return found


def rows_of_straight(drill: MakeDrill) -> dict[tuple[int, int], tuple[int, int]]:
    """Return what an undisturbed run on one rank reads."""
    straight = drill()
    straight.finish(1, hooks=lambda rank: {"rows": str(straight.home / "rows")})
    return rows_of(straight, "rows")


INSIDE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "accumulation": ("step.backward@27", ("train.microbatch_rows=2",)),
    "warm-up": ("step.update@4", ("checkpoint.every_steps=1",)),
    "an epoch": ("step.forward@13", ("data.source={small}", "data.prepared_dir={small}.d")),
    "an overlapped update": (
        "step.forward@12",
        ("offload.strategy=host", "offload.overlap=forward", "checkpoint.every_steps=3"),
    ),
}
"""Where a run is killed: the failpoint, and the settings that put something around it."""


@pytest.mark.parametrize(
    "inside",
    [
        "accumulation",
        *(pytest.param(name, marks=pytest.mark.faults) for name in list(INSIDE)[1:]),
    ],
)
def test_d6_killed_inside_a_run_goes_on_bit_for_bit(
    inside: str, drill: MakeDrill, judge: Judge, quick_home: Path, record_fault: RecordFault
) -> None:
    failpoint, words = INSIDE[inside]
    small = quick_home / "small.txt"
    # 20 steps of 8 rows of 32 bytes need 5,120 bytes: two epochs and a part of a third.
    small.write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    broken = drill(*(word.format(small=small) for word in words))
    assert broken.start(1, failpoint).wait() == [-signal.SIGKILL]
    recovery = broken.finish(1)
    judge(broken, 1)
    record_fault(f"killed inside {inside}", recovery.lost_steps, recovery.seconds)


@pytest.mark.faults
def test_d7_with_more_threads_a_run_goes_on_up_to_rounding_and_says_so(
    drill: MakeDrill, straight_run: StraightRun
) -> None:
    moved = drill()
    moved.start(1, "step.forward@10:sigterm").wait()
    moved.finish(1, hooks=lambda rank: {"threads": 2})
    assert_invariants(moved)
    printed = moved.attempts[-1].printed()
    assert "determinism lowered to D1: torch_threads is now 2, was 1" in printed
    expected = straight_run(1)
    torch.testing.assert_close(losses(moved.run), losses(expected), rtol=0, atol=1e-5)
    assert bits(moved.run)[:10] == bits(expected)[:10]


def test_d8_two_runs_from_one_checkpoint_are_the_same_and_leave_it_as_it_was(
    drill: MakeDrill, judge: Judge
) -> None:
    source = drill()
    source.start(1, "step.forward@7:sigterm").wait()
    before = contents_of(source.run)
    copies = [drill(), drill()]
    for copy in copies:
        copy.home.mkdir()
        shutil.copytree(source.run, copy.run)
        copy.finish(1)
        assert copy.attempts[-1].resumed_step() == 7
        judge(copy, 1)
    assert contents_of(source.run) == before


def contents_of(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = file_digest(file, "sha256").hexdigest()
    return found


@pytest.mark.faults
def test_d9_however_often_it_is_killed_every_row_is_learnt_from_exactly_once(
    drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    """Of each start the steps count up to the one that the next start went on from."""
    choice, broken = random.Random(20_260_109), drill("checkpoint.every_steps=2")
    kills = 5
    for number in range(kills + 1):
        attempt = broken.start(
            2,
            f"step.update@{choice.randrange(2, 6)}:kill" if number < kills else None,
            (choice.randrange(2),),
            hooks=lambda rank, number=number: {"rows": str(broken.home / f"{number}-{rank}.rows")},
        )
        broken.follow()
        attempt.wait()
    judge(broken, 2)
    begins = [attempt.resumed_step() for attempt in broken.attempts]
    learnt: list[tuple[int, int, int, int]] = []
    for number, (first, stop) in enumerate(zip(begins, [*begins[1:], 20], strict=True)):
        assert first is not None
        assert stop is not None
        rows = [
            tuple(map(int, line.split()))
            for path in broken.home.glob(f"{number}-*.rows")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        learnt += [row for row in rows if first <= row[0] < stop]
    expected = [(*place, *row) for place, row in rows_of_straight(drill).items()]
    assert sorted(learnt) == sorted(expected)
    assert len(expected) == 20 * 8
    for recovery in broken.recoveries():
        record_fault("killed between checkpoints, 2 ranks", recovery.lost_steps, recovery.seconds)
