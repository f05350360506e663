"""Runs that are killed under one engine and go on under another, and under DeepSpeed's ZeRO."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from digests import stored_digest
from drill import Attempt, Drill
from invariants import assert_invariants, bits

from interlace.trainer.checkpoint import CheckpointStore

MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]
StraightRun = Callable[..., Path]
RecordFault = Callable[[str, int, float], None]

FSDP2 = ("parallel.engine=fsdp2", "parallel.zero_stage=3", "offload.strategy=none")


def zero(stage: int, home: str = "none") -> tuple[str, ...]:
    """Return the words for a stage of ZeRO and a strategy of offloading."""
    return (
        "parallel.engine=deepspeed",
        f"parallel.zero_stage={stage}",
        f"offload.strategy={home}",
    )


def losses(run: Path) -> torch.Tensor:
    """Losses of all steps, float64."""
    values = [float.fromhex(loss) for _, loss, _, _ in bits(run)]
    return torch.tensor(values, dtype=torch.float64)


def go_on(
    moved: Drill, ranks: int, words: Sequence[str], failpoint: str | None
) -> tuple[Attempt, list[int]]:
    """Start a run that may have been started before; hold what it loads to what was saved, and
    return the start and its exit codes.
    """
    store = CheckpointStore(moved.run / "checkpoints")
    steps = store.committed_steps() if moved.attempts else []
    found = moved.home / f"digest-{len(moved.attempts)}"
    saved = stored_digest(moved.run, steps[-1]) if steps else ""
    attempt = moved.start(ranks, failpoint, words=words, hooks=lambda rank: {"digest": str(found)})
    moved.follow()
    codes = attempt.wait()
    if steps:
        assert attempt.resumed_step() == steps[-1], attempt.printed()
        assert found.read_text(encoding="utf-8") == saved
    return attempt, codes


CHAINS = {
    "there-and-back": ((2, FSDP2), (2, zero(3)), (1, FSDP2), (2, FSDP2)),
    "to-zero": ((1, FSDP2), (2, zero(3, "host")), (1, zero(2)), (2, zero(1, "optimal"))),
    "from-zero": ((2, zero(1)), (2, FSDP2), (2, zero(2, "host")), (1, FSDP2)),
}


@pytest.mark.parametrize(
    ("chain", "length"),
    [
        pytest.param("there-and-back", 3, id="fsdp2-zero3-single"),
        *(pytest.param(name, 4, id=name, marks=pytest.mark.faults) for name in CHAINS),
    ],
)
def test_d4_killed_under_one_engine_a_run_goes_on_under_another(
    chain: str,
    length: int,
    drill: MakeDrill,
    straight_run: StraightRun,
    record_fault: RecordFault,
) -> None:
    moved = drill()
    parts = CHAINS[chain][:length]
    for number, (ranks, words) in enumerate(parts):
        last = number == len(parts) - 1
        # Each goes on from what the one before has saved, and is killed after another save.
        attempt, codes = go_on(moved, ranks, words, None if last else "step.update@8:kill")
        expected = [0] * ranks if last else [-signal.SIGKILL]
        assert codes[: len(expected)] == expected, attempt.printed()
    assert_invariants(moved)
    straight = losses(straight_run(1))
    torch.testing.assert_close(losses(moved.run), straight, rtol=0, atol=1e-5)
    for recovery in moved.recoveries():
        record_fault("killed, another engine", recovery.lost_steps, recovery.seconds)


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "home"), [(1, "host"), (2, "none"), (3, "none"), (3, "optimal")])
def test_d5_what_two_ranks_of_zero_saved_one_reads_and_two_again(
    stage: int, home: str, drill: MakeDrill, straight_run: StraightRun, record_fault: RecordFault
) -> None:
    moved = drill(*zero(stage, home))
    for ranks, failpoint in (
        (2, "step.forward@7:sigterm"),
        (1, "step.forward@6:sigterm"),
        (2, None),
    ):
        attempt, codes = go_on(moved, ranks, (), failpoint)
        assert codes == [0] * ranks, attempt.printed()
    assert CheckpointStore(moved.run / "checkpoints").committed_steps()[-1] == 20
    assert [attempt.resumed_step() for attempt in moved.attempts] == [0, 7, 13]
    assert_invariants(moved)
    straight = losses(straight_run(1))
    torch.testing.assert_close(losses(moved.run), straight, rtol=0, atol=1e-5)
    for recovery in moved.recoveries():
        record_fault("another number of ranks of ZeRO", recovery.lost_steps, recovery.seconds)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "home", "failpoint"),
    [
        pytest.param(stage, home, point, id=f"zero{stage}-{home}-{point}")
        for stage, home, point in (
            (1, "host", "snap.chunk@40"),
            (2, "none", "step.update@13"),
            (3, "none", "persist.half@2"),
            (3, "host", "snap.chunk@30"),
            (3, "optimal", "step.update@8"),
        )
    ],
)
def test_a1_killed_under_zero_a_run_goes_on_bit_for_bit(
    stage: int,
    home: str,
    failpoint: str,
    drill: MakeDrill,
    judge: Judge,
    record_fault: RecordFault,
) -> None:
    broken = drill(*zero(stage, home))
    attempt, codes = go_on(broken, 2, (), f"{failpoint}:kill")
    assert codes[0] == -signal.SIGKILL, attempt.printed()
    recovery = broken.finish(2)
    judge(broken, 2)
    record_fault("killed, ZeRO on 2 ranks", recovery.lost_steps, recovery.seconds)
