"""Clocks that are wrong by an hour, differently on every rank, and jump back: nothing notices."""

import os
import signal
from collections.abc import Callable

import pytest
from drill import Drill

from interlace.trainer.checkpoint import CheckpointStore

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
RecordFault = Callable[[str, int, float], None]

HOUR = 3600.0


@pytest.mark.faults
def test_h4_wrong_clocks_change_no_save_and_no_choice_of_the_newest(
    drill: MakeDrill, judge: Judge, record_fault: RecordFault
) -> None:
    words = ("checkpoint.keep_last=9",)
    skewed = drill(*words)
    store = CheckpointStore(skewed.run / "checkpoints")
    first = skewed.start(
        2, "step.update@13:kill", (1,), hooks=lambda rank: {"clock": HOUR - 2 * HOUR * rank}
    )
    assert -signal.SIGKILL in first.wait(), first.printed()
    assert store.committed_steps() == [5, 10]
    # To the file system the older of the two is the newer one, from the far future.
    for step, when in ((5, 4e9), (10, 1e9)):
        for path in (store.committed_path(step), *store.committed_path(step).iterdir()):
            os.utime(path, (when, when))
    # And to the next start its own beginning lies before all of that.
    recovery = skewed.finish(2, hooks=lambda rank: {"clock": -HOUR * (1 + rank)})
    assert skewed.attempts[-1].resumed_step() == 10
    assert store.committed_steps() == [5, 10, 15, 20]
    judge(skewed, 2)
    record_fault("wrong clocks, and killed", recovery.lost_steps, recovery.seconds)


def test_h4_the_skew_of_these_tests_is_seen_by_the_program(drill: MakeDrill) -> None:
    """Else the test above could not fail."""
    skewed = drill("train.steps=2", "train.validate_every_steps=2")
    skewed.finish(1, hooks=lambda rank: {"clock": 100 * 365 * 24 * HOUR})
    store = CheckpointStore(skewed.run / "checkpoints")
    assert store.read_manifest(2).created[:2] == "21"
