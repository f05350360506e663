"""Minutes of random faults, one after the other: what comes out is what would have come out.

`pytest tests/faults/test_soak.py -m faults --soak-minutes 30` makes them thirty.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from drill import Attempt, Drill
from invariants import assert_invariants

from interlace.trainer.exits import Exit

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
RecordFault = Callable[[str, int, float], None]

WORDS = ("train.steps=40", "checkpoint.every_steps=3")
RANKS = 2
BAD_DISKS = ("persist.open@2:enospc", "persist.half@4:eio", "manifest.pre_fsync@1:enospc")
KILLS = ("step.update@7:kill", "publish.pre_rename@2:kill", "persist.pre_fsync@1:kill")


@dataclass
class Soak:
    """A run with one fault in every start, until it is finished, and then the next run.

    Each fault is a method: it starts the run, does something to it, and waits for its end.
    """

    make: MakeDrill
    judge: Judge
    choice: random.Random
    longest_seconds: float
    runs: list[Drill] = field(default_factory=list[Drill])
    tried: list[str] = field(default_factory=list[str])

    @property
    def run(self) -> Drill:
        """The run that is broken at the moment."""
        return self.runs[-1]

    def next_fault(self) -> None:
        """Break the run once, in some way; judge it when that, or nothing, has ended it."""
        if not self.runs or (self.run.steps_done() == 40 and not any(self.codes())):
            self.runs.append(self.make(*WORDS))
        fault = self.choice.choice(
            [
                self.kill,
                self.kill_at_a_point,
                self.freeze,
                self.terminate,
                self.fail_the_disk,
                self.overtake,
            ]
        )
        self.tried.append(fault.__name__)
        fault()
        assert_invariants(self.run)
        if self.run.steps_done() == 40 and not any(self.codes()):
            self.judge(self.run, RANKS)

    def codes(self) -> list[int | None]:
        """Exit codes of the newest start."""
        return [rank.code for rank in self.run.attempts[-1].ranks]

    def follow_a_while(self) -> bool:
        """Wait for a random time; return whether the run has ended in it."""
        return self.run.follow(self.choice.uniform(0.0, self.longest_seconds))

    def end(self, attempt: Attempt, *allowed: int) -> None:
        """Wait for the end of a start, which has to be one of these."""
        self.run.follow()
        codes = attempt.wait()
        assert set(codes) <= {0, *allowed}, f"{self.tried}: {codes}\n{attempt.printed()}"

    def kill(self) -> None:
        """SIGKILL to one rank or both."""
        attempt = self.run.start(RANKS)
        if not self.follow_a_while():
            attempt.kill(*self.choice.choice([(0,), (1,), (0, 1)]))
        self.end(attempt, -signal.SIGKILL, Exit.DEFECT)

    def kill_at_a_point(self) -> None:
        """SIGKILL at a failpoint."""
        victims = self.choice.choice([(0,), (1,), (0, 1)])
        attempt = self.run.start(RANKS, self.choice.choice(KILLS), victims)
        self.end(attempt, -signal.SIGKILL, Exit.DEFECT)

    def freeze(self) -> None:
        """SIGSTOP to one rank, and SIGCONT a moment later."""
        attempt = self.run.start(RANKS)
        if not self.follow_a_while():
            rank = self.choice.randrange(RANKS)
            attempt.signal(signal.SIGSTOP, rank)
            self.run.follow(self.choice.uniform(0.0, 1.0))
            attempt.signal(signal.SIGCONT, rank)
        self.end(attempt)

    def terminate(self) -> None:
        """SIGTERM to one rank; before the first step nothing listens for it yet."""
        attempt = self.run.start(RANKS)
        if not self.follow_a_while():
            attempt.signal(signal.SIGTERM, self.choice.randrange(RANKS))
        self.end(attempt, -signal.SIGTERM, Exit.DEFECT, Exit.PREEMPTED)

    def fail_the_disk(self) -> None:
        """A write that fails once, on one rank."""
        point, victim = self.choice.choice(BAD_DISKS), self.choice.randrange(RANKS)
        self.end(self.run.start(RANKS, point, (victim,)))

    def overtake(self) -> None:
        """A second start beside the first, which nobody ended: who took its number last goes on."""
        first = self.run.start(RANKS)
        if not self.follow_a_while():
            second = self.run.start(RANKS)
            self.end(second, Exit.SUPERSEDED, Exit.DEFECT)
            codes = first.wait()
            assert set(codes) <= {0, Exit.SUPERSEDED, Exit.DEFECT}, first.printed()
            assert not any(codes) or not any(self.codes()), first.printed() + second.printed()
        self.end(first, Exit.SUPERSEDED, Exit.DEFECT)


@pytest.fixture
def soak(drill: MakeDrill, judge: Judge) -> Soak:
    """Faults in an order that is always the same, at times that are not."""
    undisturbed = drill(*WORDS)
    began = time.monotonic()
    undisturbed.finish(RANKS)
    seconds = time.monotonic() - began
    return Soak(drill, judge, random.Random(20_260_110), seconds)


@pytest.mark.faults
def test_j1_minutes_of_random_faults_change_nothing(
    soak: Soak, soak_minutes: float, record_fault: RecordFault
) -> None:
    until = time.monotonic() + 60 * soak_minutes
    while time.monotonic() < until:
        soak.next_fault()
    soak.run.finish(RANKS)
    soak.judge(soak.run, RANKS)
    recoveries = [recovery for run in soak.runs for recovery in run.recoveries()]
    lost = sum(recovery.lost_steps for recovery in recoveries)
    print(
        f"{len(soak.tried)} faults in {len(soak.runs)} runs; {lost} steps taken again: of all "
        f"steps {40 * len(soak.runs) / (40 * len(soak.runs) + lost):.0%} counted"
    )
    for recovery in recoveries:
        record_fault("random faults, 2 ranks", recovery.lost_steps, recovery.seconds)
