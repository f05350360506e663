"""Every order in which two starts of a run can interleave while they save, one step at a time.

    python commit_model.py FOLDER RANKS SAVES MOST_STATES

The real `CheckpointStore` runs here, not a model of it: each rank of each start is a thread, and an
audit hook stops it before everything that others could see (listing, creating, renaming or deleting
under the run folder). A scheduler lets one thread do one such step, so that a schedule is a list of
choices, and walks through all of them depth first. A schedule is followed from the beginning each
time (stateless model checking; Godefroid 1997, Model Checking for Programming Languages using
VeriSoft), and given up where what lies on the disk and all that every thread has seen is known
already.

In every state reached: every visible checkpoint is whole, every acknowledged one is visible or
rightly gone, no step has two publishers. And since SIGKILL lets nothing more happen, every state is
also one in which all ranks were killed: a third start, on a copy, goes on from what was
acknowledged and saves. Prints a JSON summary.
"""

import json
import logging
import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from interlace.trainer.checkpoint import CheckpointStore, FileRecord, Superseded, write_file
from interlace.trainer.checkpoint.verify import verify_step
from interlace.trainer.errors import SaveError

KEEP_LAST = 2
EVERY = 10**9
"""As many states as there are."""

SEEN = {"os.listdir", "os.scandir", "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
LISTINGS = {"os.listdir", "os.scandir"}


class Dropped(BaseException):
    """Ends a thread whose schedule is not followed any further."""


class Actor(threading.Thread):
    """One rank of one start: it takes a step when it is told to, and waits before the next."""

    def __init__(self, name: str, root: str, work: Callable[["Actor"], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.root = root
        self.work = work
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.trace: list[object] = []
        self.ready: Callable[[], bool] = lambda: True
        self.done = self.dropped = self.looking = False
        self.problem: str | None = None

    def run(self) -> None:
        try:
            self.pause("begin")
            self.work(self)
        except Dropped:
            pass
        except BaseException as error:
            self.problem = f"{self.name}: {type(error).__name__}: {error}"
        self.done = True
        self.arrived.release()

    def pause(self, *what: object) -> None:
        """Wait for the next turn; `what` is what comes then."""
        if self.dropped:
            return
        self.arrived.release()
        self.go.acquire()
        if self.dropped:
            raise Dropped
        self.trace.append(what)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Take no turn before something has come."""
        self.ready = ready
        self.pause("wait")
        self.ready = lambda: True

    def step(self) -> None:
        """Let it take one step, up to the next pause or its end."""
        self.go.release()
        self.arrived.acquire()

    def look(self, event: str, path: str) -> None:
        """Stop before an operation on a path, and remember what a listing shows."""
        if self.looking or self.dropped or not path.startswith(self.root):
            return
        self.looking = True
        try:
            if self.is_unseen(event, path):
                return
            self.pause(event, path)
            if event in LISTINGS and Path(path).is_dir():
                self.trace.append(sorted(entry.name for entry in Path(path).iterdir()))
        finally:
            self.looking = False

    def is_unseen(self, event: str, path: str) -> bool:
        """Whether an operation shows to nobody: a folder that is there already is made or opened
        (for its fsync), or something is deleted that was renamed into trash/ before.
        """
        if event != "os.rename" and f"{os.sep}trash" in path:
            return True
        return event in ("os.mkdir", "open") and Path(path).is_dir()


def hook(event: str, arguments: tuple[object, ...]) -> None:
    """Stop the thread before what others could see."""
    if event not in SEEN:
        return
    actor = threading.current_thread()
    if isinstance(actor, Actor) and isinstance(arguments[0], (str, os.PathLike)):
        actor.look(event, os.fspath(arguments[0]))


def stopping_before(exists: Callable[[str], bool]) -> Callable[[str], bool]:
    """Make a look for a file a step of its own: it raises no event."""

    def look(path: str) -> bool:
        actor = threading.current_thread()
        if isinstance(actor, Actor):
            actor.look("lexists", os.fspath(path))
        found = exists(path)
        if isinstance(actor, Actor):
            actor.trace.append(found)
        return found

    return look


@dataclass
class Start:
    """One start of the run: what its ranks tell each other, and what it has promised."""

    store: CheckpointStore
    saves: int
    ranks: int
    promises: list[tuple[int, int]]
    problems: list[str]
    orders: list[tuple[int, Path]] = field(default_factory=list[tuple[int, Path]])
    records: list[FileRecord | str] = field(default_factory=list[FileRecord | str])
    ended: bool = False

    def lead(self, actor: Actor) -> None:
        """Rank 0: resume, save, let go; ends when another start has taken over."""
        promised = newest(self.promises)
        attempt = self.store.begin_attempt()
        step, _ = self.store.newest_usable()
        actor.trace.append((attempt, step))
        if step < promised:
            self.problems.append(f"attempt {attempt} went on from {step}, not {promised}")
        for _ in range(self.saves):
            step += 1
            try:
                self.save(actor, step, attempt)
            except (Superseded, SaveError) as error:
                if not isinstance(error, Superseded) and self.store.live_attempt() == attempt:
                    self.problems.append(f"attempt {attempt}: {error}")
                self.store.abandon(step, attempt)
                break
            self.promises.append((step, attempt))
            self.store.retain(KEEP_LAST, 0)
        self.ended = True

    def save(self, actor: Actor, step: int, attempt: int) -> None:
        """Rank 0 of one save."""
        folder = self.store.reserve(step, attempt, 100)
        self.orders.append((step, folder))
        own = write_file(folder / "rank-0", [contents(step, 0)])
        if self.ranks > 1:
            wanted = len(self.orders)
            actor.wait_for(lambda: len(self.records) == wanted)
            other = self.records[-1]
            if isinstance(other, str):
                raise SaveError(other)
            self.store.publish(step, attempt, [own, other], {})
        else:
            self.store.publish(step, attempt, [own], {})

    def follow(self, actor: Actor) -> None:
        """Rank 1: write a file for every order, and tell what came of it."""
        while True:
            actor.wait_for(lambda: self.ended or len(self.orders) > len(self.records))
            if len(self.orders) == len(self.records):
                return
            step, folder = self.orders[-1]
            try:
                self.records.append(write_file(folder / "rank-1", [contents(step, 1)]))
            except SaveError as error:
                self.records.append(str(error))


def newest(promises: Sequence[tuple[int, int]]) -> int:
    """Return the largest step that was acknowledged."""
    return max((step for step, _ in promises), default=0)


def contents(step: int, rank: int) -> bytes:
    """What a rank saves at a step."""
    return f"step {step} rank {rank}".encode()


class Schedule:
    """Two starts beside each other, from a run that has two checkpoints.

    Args:
        root: The run folder; made anew.
        ranks: Of each start.
        saves: That each start makes.
    """

    def __init__(self, root: Path, ranks: int, saves: int) -> None:
        shutil.rmtree(root, ignore_errors=True)
        self.ranks = ranks
        self.store = CheckpointStore(root / "checkpoints")
        self.promises: list[tuple[int, int]] = []
        self.problems: list[str] = []
        attempt = self.store.begin_attempt()
        for step in range(1, KEEP_LAST + 1):
            publish(self.store, step, attempt, ranks)
            self.promises.append((step, attempt))
        self.actors: list[Actor] = []
        for name in ("first", "second"):
            start = Start(self.store, saves, ranks, self.promises, self.problems)
            works = [start.lead, start.follow][:ranks]
            self.actors += [
                Actor(f"{name} rank {rank}", str(root), work) for rank, work in enumerate(works)
            ]
        for actor in self.actors:
            actor.start()
            actor.arrived.acquire()

    def choices(self) -> list[int]:
        """Return who can take a step."""
        return [n for n, actor in enumerate(self.actors) if not actor.done and actor.ready()]

    def disk(self) -> int:
        """Return what tells this state from others once all ranks are killed."""
        files = [
            (folder, [(name, published_by(folder, name)) for name in sorted(names)])
            for folder, _, names in sorted(os.walk(self.store.folder))
        ]
        return hash(repr((files, self.promises, self.problems)))

    def key(self) -> tuple[int, ...]:
        """Return what tells this state from others: the disk, and all that each rank has seen."""
        seen = (hash(repr((actor.trace, actor.problem))) for actor in self.actors)
        return (self.disk(), *seen)

    def drop(self) -> None:
        """End the threads."""
        for actor in self.actors:
            if not actor.done:
                actor.dropped = True
                actor.go.release()
                actor.join()

    def judge(self, copy: Path) -> list[str]:
        """Return what is wrong in this state, and after killing everybody in it."""
        problems = self.problems + [actor.problem for actor in self.actors if actor.problem]
        problems += judge_disk(self.store, self.promises)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.store.folder, copy / "checkpoints")
        survivor = CheckpointStore(copy / "checkpoints")
        attempt = survivor.begin_attempt()
        step, broken = survivor.newest_usable()
        if broken or step < newest(self.promises):
            problems.append(f"killed here, a new start goes on from {step}: {self.promises}")
        publish(survivor, step + 1, attempt, self.ranks)
        survivor.retain(KEEP_LAST, 0)
        return problems + judge_disk(survivor, [*self.promises, (step + 1, attempt)])


def publish(store: CheckpointStore, step: int, attempt: int, ranks: int) -> None:
    """Save a step in one go."""
    folder = store.reserve(step, attempt, 100)
    files = [write_file(folder / f"rank-{rank}", [contents(step, rank)]) for rank in range(ranks)]
    store.publish(step, attempt, files, {})


def published_by(folder: str, name: str) -> str:
    """Return the attempt that wrote a manifest; other files are told apart by their names."""
    if name != "MANIFEST.json":
        return ""
    found = re.search(r'"attempt": ?(\d+)', Path(folder, name).read_text(encoding="utf-8"))
    return found[1] if found else "unfinished"


def judge_disk(store: CheckpointStore, promises: Sequence[tuple[int, int]]) -> list[str]:
    """Compare what is visible with what must be in it and with what was acknowledged."""
    problems: list[str] = []
    visible = store.committed_steps()
    attempts = dict(promises)
    if len(attempts) < len(promises):
        problems.append(f"a step was published twice: {promises}")
    for step in visible:
        problems += verify_step(store.folder, step).problems
        files = {path.name: path.read_bytes() for path in store.committed_path(step).glob("rank-*")}
        if any(data != contents(step, int(name[5:])) for name, data in files.items()):
            problems.append(f"step {step} holds something else")
        publisher = store.read_manifest(step).attempt
        if attempts.get(step, publisher) != publisher:
            problems.append(f"step {step} was acknowledged by {attempts[step]}, is of {publisher}")
    known = set(visible) | set(attempts)
    for step in set(attempts) - set(visible):
        if sum(other > step for other in known) < KEEP_LAST:
            problems.append(f"step {step} was acknowledged and is gone; visible: {visible}")
    return problems


def explore(root: Path, ranks: int, saves: int, most_states: int) -> dict[str, object]:
    """Walk through schedules, through all if there are no more states; return what was seen."""
    choice = random.Random(0)
    known: set[tuple[int, ...]] = set()
    judged: set[int] = set()
    ahead: list[list[int]] = [[]]
    problems: list[str] = []
    followed = ends = 0
    while ahead and not problems and len(known) < most_states:
        path = ahead.pop(choice.randrange(len(ahead)) if most_states < EVERY else -1)
        schedule = Schedule(root / "run", ranks, saves)
        for number in path:
            schedule.actors[number].step()
        followed += 1
        while (key := schedule.key()) not in known and not problems:
            known.add(key)
            if key[0] not in judged:
                judged.add(key[0])
                problems += [f"{path}: {text}" for text in schedule.judge(root / "copy")]
            choices = schedule.choices()
            if not choices:
                ends += 1
                problems += [f"{path}: {one.name} waits" for one in schedule.actors if not one.done]
                break
            ahead += [[*path, other] for other in choices[1:]]
            path = [*path, choices[0]]
            schedule.actors[choices[0]].step()
        schedule.drop()
    summary = {"states": len(known), "disks": len(judged), "schedules": followed, "ends": ends}
    return {**summary, "complete": not ahead, "problems": problems[:5]}


if __name__ == "__main__":
    # Two starts that let the same checkpoint go tell of it in the log, thousands of times here.
    logging.disable()
    sys.addaudithook(hook)
    os.path.lexists = stopping_before(os.path.lexists)  # type: ignore[assignment]
    summary = explore(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(summary))
