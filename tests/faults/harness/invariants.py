"""What holds after every fault, whatever it was.

    I1  every visible checkpoint is sound
    I2  no start goes on from before what was acknowledged when it began
    I3  nothing that was acknowledged is missing, but for what retention lets go
    I4  a step is published by one start only
    I5  no process and no temporary file is left
    I6  a rank that ended badly without being killed says why, under its own exit status: in a file,
        or on the terminal where its start had no number yet

`assert_same_run` adds that the run ended as if nothing had happened.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from digests import stored_digest
from drill import Drill

from interlace.trainer.checkpoint import CheckpointStore, verify_run
from interlace.trainer.exits import Exit

ORPHAN_SECONDS = 30.0
"""How long what belongs to a rank may outlive it: its watcher writes down how it ended."""

KEEP_LAST = 2
"""checkpoint.keep_last of the drills."""


def acknowledged(ack_log: Path) -> list[tuple[int, int]]:
    """Return (step, attempt) of every commit that was acknowledged, in order."""
    if not ack_log.is_file():
        return []
    lines = ack_log.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"step (\d+) attempt (\d+) committed", line) for line in lines]
    assert all(found), lines
    return [(int(match[1]), int(match[2])) for match in found if match]


def assert_invariants(drill: Drill) -> None:
    """Hold a drill whose ranks have all ended to I1 to I6."""
    problems = [*visible(drill), *resumptions(drill), *left_over(drill), *silent_ends(drill)]
    outputs = [attempt.printed() for attempt in drill.attempts[-2:]] if problems else []
    assert not problems, "\n".join([*problems, *outputs])


def visible(drill: Drill) -> Iterator[str]:
    """I1, I3 and I4: what lies in the run folder against what was acknowledged."""
    checkpoints = drill.run / "checkpoints"
    if not checkpoints.is_dir():
        return
    for report in verify_run(checkpoints):
        yield from report.problems
    store = CheckpointStore(checkpoints)
    steps, acks = store.committed_steps(), acknowledged(drill.ack_log)
    promised = {step for step, _ in acks}
    if len(promised) < len(acks):
        yield f"a step was acknowledged twice: {acks}"
    for step in sorted(promised - set(steps)):
        newer = sum(other > step for other in promised | set(steps))
        if newer < KEEP_LAST:
            yield f"step {step} was acknowledged and is gone; visible: {steps}"
    attempts = dict(acks)
    for step in steps:
        published = store.read_manifest(step).attempt
        if attempts.get(step, published) != published:
            yield f"step {step}: acknowledged by attempt {attempts[step]}, is of {published}"


def resumptions(drill: Drill) -> Iterator[str]:
    """I2: where every start went on from."""
    for number, attempt in enumerate(drill.attempts):
        resumed = attempt.resumed_step()
        if resumed is not None and resumed < attempt.promised_step:
            yield (
                f"start {number + 1} went on from step {resumed}, but {attempt.promised_step} was "
                "acknowledged"
            )


def left_over(drill: Drill) -> Iterator[str]:
    """I5: processes that know the drill's folder, and files that nobody will look for."""
    yield from (f"temporary file {path}" for path in drill.temporary.iterdir())
    if not any(rank.code for rank in drill.attempts[-1].ranks):
        # What a killed start leaves in inflight/, the next one removes.
        yield from (f"unfinished file {path}" for path in drill.run.rglob("*.partial"))
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (orphans := list(processes_of(drill))) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield from orphans


def processes_of(drill: Drill) -> Iterator[str]:
    """Yield every living process that was started with the drill's folder in its environment or
    command line.
    """
    mark = os.fsencode(drill.home)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words, variables = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if mark in words + variables:
            yield f"process {process.name} is left over: {words!r}"


def silent_ends(drill: Drill) -> Iterator[str]:
    """I6: the file of every rank that ended badly by itself, or its words."""
    known = {int(status) for status in Exit}
    for attempt in drill.attempts:
        for rank, process in enumerate(attempt.ranks):
            code = process.code
            assert code is not None, "a drill is judged when all its ranks have ended"
            if code <= 0 or code > 128:
                # Killed, or told by a second signal to leave at once.
                continue
            if code not in known:
                yield f"rank {rank} ended with {code}, which is no status of ours"
            if code == Exit.MISTAKE:
                continue
            if attempt.resumed_step() is None and "interlace: " in attempt.said(rank):
                # Its start had no number yet, and so no file.
                continue
            ends = [
                json.loads(path.read_text(encoding="utf-8"))
                for path in (drill.run / "ends").glob(f"attempt-*/rank-{rank}.json")
            ]
            if not any(end["status"] == code for end in ends):
                yield f"rank {rank} ended with {code} and left no reason: {ends}"


def assert_same_run(drill: Drill, straight: Path) -> None:
    """Hold a finished run to the undisturbed one: every step once, its loss, gradient norm and rate
    to the last bit, and so every tensor of the final state.
    """
    assert bits(drill.run) == bits(straight)
    stores = [CheckpointStore(run / "checkpoints") for run in (drill.run, straight)]
    last = [store.committed_steps()[-1] for store in stores]
    assert last[0] == last[1] == len(bits(straight)) == acknowledged(drill.ack_log)[-1][0]
    assert stored_digest(drill.run, last[0]) == stored_digest(straight, last[0])


def bits(run: Path) -> list[tuple[int, str, str, str]]:
    """Return step, loss, gradient norm and learning rate of every record, as bits."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        (record["step"], *(float(record[key]).hex() for key in ("loss", "grad_norm", "lr")))
        for record in records
    ]
