"""Kill a small two-rank run of the commit layer over and over; check the disk after every kill.

    python commit_kill_trials.py FOLDER KILLS SEED

A program of its own, because it forks: it loads neither torch nor pytest and starts no thread.
Rank 1 writes files; rank 0 writes files, publishes, reads back and retains, without end. Half of
the kills happen at a random time to a random choice of ranks, half at a random failpoint of one
rank. Beside them, a fifth as often, a second start overtakes a run that is still alive. After
every trial the folder is judged by means of its own: the contents of every file are a function of
the step, and an append-only, fsynced log outside the run says what was promised. Prints a JSON
summary.
"""

import hashlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from interlace.trainer.checkpoint import (
    CheckpointStore,
    FileRecord,
    Superseded,
    failpoints,
    verify_run,
    write_file,
)
from interlace.trainer.errors import SaveError

KEEP_LAST, KEEP_EVERY = 2, 200
WRITER_POINTS = ["persist.open", "persist.half", "persist.pre_fsync", "persist.post_rename"]
COMMITTER_POINTS = sorted(
    name for name in failpoints.FAILPOINTS if not name.startswith(("snap.", "step.", "persist."))
)


def contents(step: int, rank: int) -> bytes:
    """What rank `rank` saves at a step: 1 to 60,000 bytes that occur nowhere else."""
    size = 1 + (step * 7919 + rank * 104_729) % 60_000
    return hashlib.shake_256(f"{step} {rank}".encode()).digest(size)


def write_own_file(folder: Path, step: int, rank: int) -> FileRecord:
    whole = contents(step, rank)
    cuts = range(0, len(whole), 16_384)
    return write_file(folder / f"rank-{rank}", (whole[cut : cut + 16_384] for cut in cuts))


@dataclass(frozen=True)
class Log:
    """The promises made, outside the run: a line is on disk before `append` returns."""

    path: Path

    def append(self, line: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{line}\n".encode())
        os.fsync(descriptor)
        os.close(descriptor)

    def read(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]


def commit_for_ever(store: CheckpointStore, log: Log, orders: TextIO, records: TextIO) -> None:
    """Rank 0: resume, then save step after step until killed, or until rank 1 is gone."""
    attempt = store.begin_attempt()
    step = 0
    if store.committed_steps():
        step, _ = store.newest_usable()
    log.append(f"start {attempt} {step}")
    while True:
        step += 1
        try:
            save(store, step, attempt, orders, records)
        except (BrokenPipeError, json.JSONDecodeError, Superseded):
            # Rank 1 is gone, or another start took over.
            store.abandon(step, attempt)
            return
        log.append(f"committed {step}")
        manifest = store.read_manifest(step)
        for record in manifest.files:
            store.verified_path(step, record.name, manifest)
            failpoints.failpoint("load.mid")
        store.retain(KEEP_LAST, KEEP_EVERY)


def save(store: CheckpointStore, step: int, attempt: int, orders: TextIO, records: TextIO) -> None:
    """Rank 0 of one save; `orders` tells rank 1 where to write, `records` what it wrote."""
    folder = store.reserve(step, attempt, 120_000)
    print(step, folder, file=orders, flush=True)
    try:
        own = write_own_file(folder, step, 0)
    except SaveError:
        # The folder is gone because another start took over; anything else is a failed trial.
        store.require_live(attempt)
        raise
    other = FileRecord(**json.loads(records.readline()))
    store.publish(step, attempt, [own, other], {"step": step})


def write_for_ever(orders: TextIO, records: TextIO) -> None:
    """Rank 1: write a file for every order until killed, or until rank 0 is gone."""
    with suppress(BrokenPipeError):
        for line in orders:
            step, folder = line.split()
            try:
                record = write_own_file(Path(folder), int(step), 1)
            except SaveError:
                if Path(folder).exists():
                    raise
                return
            print(json.dumps(vars(record)), file=records, flush=True)


def fork(rank: int, armed: str | None, work: Callable[[], None]) -> int:
    """Start a rank; it ends with status 0, 1 after a traceback, or by a signal."""
    child = os.fork()
    if child:
        return child
    # Ends a rank that never reaches its failpoint; no other signal but SIGKILL is expected.
    signal.alarm(60)
    os.environ["RANK"] = str(rank)
    if armed is not None:
        os.environ[failpoints.VARIABLE] = armed
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start_ranks(
    store: CheckpointStore, log: Log, armed: tuple[str | None, str | None]
) -> list[int]:
    orders, records = os.pipe(), os.pipe()

    def rank_0() -> None:
        os.close(orders[0])
        os.close(records[1])
        commit_for_ever(store, log, os.fdopen(orders[1], "w"), os.fdopen(records[0]))

    def rank_1() -> None:
        os.close(orders[1])
        os.close(records[0])
        write_for_ever(os.fdopen(orders[0]), os.fdopen(records[1], "w"))

    children = [fork(0, armed[0], rank_0), fork(1, armed[1], rank_1)]
    for descriptor in (*orders, *records):
        os.close(descriptor)
    return children


@dataclass
class Trials:
    """The trials so far, and what was found wrong."""

    store: CheckpointStore
    log: Log
    choice: random.Random
    killed: Counter[str] = field(default_factory=Counter[str])
    abandoned: int = 0
    problems: list[str] = field(default_factory=list[str])

    def kill_at_a_time(self, longest_seconds: float) -> None:
        victims = self.choice.choice([[0], [1], [0, 1]])
        delay = self.choice.uniform(0.0, longest_seconds)
        children = start_ranks(self.store, self.log, (None, None))
        # Not a wait for something to happen: the instant of the kill is the random variable.
        time.sleep(delay)
        # Stopped first, so that neither sees the other die and ends by itself.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in victims:
                os.kill(children[rank], number)
        self.judge("time", children, victims, f"ranks {victims} after {delay:.4f} s")

    def kill_at_a_point(self) -> None:
        victim = self.choice.choice([0, 0, 0, 1])
        points = WRITER_POINTS if victim else COMMITTER_POINTS + WRITER_POINTS
        point, visit = self.choice.choice(points), self.choice.randrange(1, 4)
        armed = f"{point}@{visit}:kill"
        children = start_ranks(self.store, self.log, (None, armed) if victim else (armed, None))
        self.judge(point, children, [victim], f"rank {victim} at {armed}")

    def overtake(self, longest_seconds: float) -> None:
        """Start a second pair of ranks beside a first that nobody stopped."""
        before = self.starts()
        old = start_ranks(self.store, self.log, (None, None))
        delay = self.choice.uniform(0.0, longest_seconds)
        # Until it is in the log, not merely under way: a start that is preempted between taking its
        # number and writing the line would stand in the log behind the one that overtook it.
        while self.starts() == before:
            os.sched_yield()
        time.sleep(delay)
        new = start_ranks(self.store, self.log, ("publish.post_rename@3:kill", None))
        codes = wait_all(new + old)
        self.note(f"overtaken after {delay:.4f} s", codes, [-signal.SIGKILL, 0, 0, 0])

    def starts(self) -> int:
        """Return how many starts are in the log."""
        return sum(line[:1] == ["start"] for line in self.log.read())

    def judge(self, kind: str, children: list[int], victims: list[int], what: str) -> None:
        """Wait for the ranks to end as they should and count the kill."""
        expected = [-signal.SIGKILL if rank in victims else 0 for rank in range(2)]
        self.note(what, wait_all(children), expected)
        self.killed[kind] += 1
        self.abandoned += any((self.store.folder / "inflight").glob("*"))

    def note(self, what: str, codes: list[int], expected: list[int]) -> None:
        """Remember every way in which the ranks or the disk are not as they must be."""
        found = [*disk_problems(self.store.folder), *promise_problems(self.store, self.log)]
        if codes != expected:
            found.append(f"exit codes {codes} instead of {expected}")
        self.problems += [f"{what}: {problem}" for problem in found]


def wait_all(children: list[int]) -> list[int]:
    """Return the exit codes of the ranks; minus the signal for those that were killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def disk_problems(checkpoints: Path) -> list[str]:
    """Compare every visible checkpoint with what must be in it, byte for byte."""
    problems = [text for report in verify_seen(checkpoints) for text in report]
    for folder in (checkpoints / "committed").glob("*"):
        if re.fullmatch("[0-9]{8}", folder.name) is None:
            problems.append(f"{folder} is no step")
            continue
        step = int(folder.name)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        manifest = json.loads(found.pop("MANIFEST.json", b"{}"))
        expected = {f"rank-{rank}": contents(step, rank) for rank in range(2)}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}
        promised = {entry["name"]: entry["sha256"] for entry in manifest.get("files", [])}
        if found != expected or promised != digests or manifest.get("step") != step:
            problems.append(f"{folder} is visible but wrong")
    return problems


def verify_seen(checkpoints: Path) -> list[tuple[str, ...]]:
    if not checkpoints.is_dir():
        return []
    return [report.problems for report in verify_run(checkpoints)]


def promise_problems(store: CheckpointStore, log: Log) -> list[str]:
    """Compare the log with what is visible, and every start with what was promised before it."""
    problems: list[str] = []
    committed: set[int] = set()
    attempts: list[int] = []
    for kind, *numbers in log.read():
        if kind == "committed":
            committed.add(int(numbers[0]))
            continue
        attempt, resumed = map(int, numbers)
        if resumed < max(committed, default=0):
            problems.append(
                f"attempt {attempt} resumed {resumed}, but {max(committed)} was promised"
            )
        attempts.append(attempt)
    if attempts != sorted(set(attempts)):
        problems.append("an attempt number was given twice or went back")
    visible = set(store.committed_steps())
    for step in committed - visible:
        newer = sum(other > step for other in committed | visible)
        if newer < KEEP_LAST or step % KEEP_EVERY == 0:
            problems.append(f"step {step} was promised and is gone")
    return problems


def seconds_per_save(store: CheckpointStore, log: Log) -> float:
    """Measure the disk: start, save 20 times, die."""
    started = time.monotonic()
    wait_all(start_ranks(store, log, ("publish.post_rename@20:kill", None)))
    return (time.monotonic() - started) / 20


def main(folder: Path, kills: int, seed: int) -> None:
    """Run the trials and print what happened."""
    # Ends the program itself, should ranks that are broken keep it waiting.
    signal.alarm(300)
    store, log = CheckpointStore(folder / "run" / "checkpoints"), Log(folder / "promises")
    log.append("start 0 0")
    trials = Trials(store, log, random.Random(seed))
    longest_seconds = 5 * seconds_per_save(store, log)
    for trial in range(kills):
        if trial % 2:
            trials.kill_at_a_point()
        else:
            trials.kill_at_a_time(longest_seconds)
        if trial % 5 == 0:
            trials.overtake(longest_seconds)
    attempt = store.begin_attempt()
    store.reserve(10**6, attempt, 1)
    summary = {
        "problems": trials.problems,
        "killed": trials.killed,
        "abandoned": trials.abandoned,
        "attempts": attempt,
        "promised": sum(line[0] == "committed" for line in log.read()),
        "inflight": [path.name for path in (store.folder / "inflight").iterdir()],
        "trash": [path.name for path in (store.folder / "trash").iterdir()],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
