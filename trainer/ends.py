"""How processes of a run ended: RUN/ends/attempt-N/rank-R.json for every rank that ended otherwise
than it should.

Of several ranks that fail within a second, one has failed and the others have noticed. A person
wants the first, once, readable: `first_failure` finds it, launchers print it at the end. What the
others said stays in their files. Times in the files are those of the clocks on the wall; they order
only failures of the same weight.

Also here is what begins an attempt, `start.json`: from which step, and whether a person or a
launcher asked for it. Nothing of the environment is written, which may hold secrets.
"""

import json
import os
import re
import socket
import time
import traceback
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

Kind = Literal["error", "mistake", "stalled", "vanished", "stopped", "peer", "waiting"]
"""`error` a defect, `mistake` a condition that a person can mend, `stalled` no progress, `vanished`
gone without a word, `stopped` on request; `peer` and `waiting` are the consequences of another
rank's end or stall.
"""

CONSEQUENCES = frozenset({"peer", "waiting"})
LAUNCHER_VARIABLE = "INTERLACE_LAUNCHER"
"""Set by a launcher that prints `first_failure` itself when all ranks have ended."""

_ALIKE_WITHIN = 3.0
_RECORDED = "recorded in "
_ATTEMPT = re.compile(r"attempt-([1-9][0-9]*)")
_RANK = re.compile(r"rank-[0-9]+\.json")
_PEER_WORDS = re.compile(
    r"gloo/|ncclRemoteError|Connection (?:closed|reset) by peer|Socket Timeout|recvValue failed"
    r"|TCPStore|Broken pipe"
)


@dataclass(frozen=True, kw_only=True)
class End:
    """How one rank of one attempt ended.

    Attributes:
        attempt: Number of the start, from 1.
        rank: The rank.
        kind: Why, in one word; see `Kind`.
        reason: Why, in words.
        status: Exit status of the process; None where it could not choose one.
        step: Step it was in, from 1; 0 before the first.
        phase: What it was doing, as it told its watcher.
        traceback: Python stack, where there is one.
        host: Name of the machine.
        pid: Process number there.
        time: Seconds since 1970 on the clock of that machine.
    """

    attempt: int
    rank: int
    kind: Kind
    reason: str
    status: int | None = None
    step: int = 0
    phase: str = ""
    traceback: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)


def ends_folder(run_dir: Path, attempt: int) -> Path:
    """Return where the ends of one attempt lie; it need not exist."""
    return run_dir / "ends" / f"attempt-{attempt}"


def record_end(run_dir: Path, end: End) -> Path | None:
    """Write how a rank ended, unless that is known already; return the file, or None if it could
    not be written.
    """
    path = ends_folder(run_dir, end.attempt) / f"rank-{end.rank}.json"
    try:
        if not path.exists():
            write_document(path, asdict(end))
    except OSError:
        # The storage may be what has failed: then the terminal is all there is.
        return None
    return path


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that a reader sees whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_document(path: Path) -> dict[str, Any] | None:
    """Return a JSON object that `write_document` wrote; None if there is none to be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(dict[str, Any], document) if isinstance(document, dict) else None


def attempts_of(run_dir: Path) -> list[int]:
    """Return the attempts of which something is known, ascending."""
    try:
        names = [path.name for path in (run_dir / "ends").iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name)))


def ends_of(run_dir: Path, attempt: int) -> list[End]:
    """Return the ends of one attempt; those that failed by themselves first, then by time."""
    try:
        paths = list(ends_folder(run_dir, attempt).iterdir())
    except OSError:
        return []
    documents = [read_document(path) for path in paths if _RANK.fullmatch(path.name)]
    ends = [end for document in documents if document and (end := end_of(document)) is not None]
    return sorted(ends, key=lambda end: (end.kind in CONSEQUENCES, end.time, end.rank))


def end_of(document: dict[str, Any]) -> End | None:
    """Return the end that a JSON object holds; None if it holds none."""
    known = {each.name for each in fields(End)}
    try:
        end = End(**{key: value for key, value in document.items() if key in known})
    except TypeError:
        return None
    return end if end.kind in get_args(Kind) else None


def first_failure(run_dir: Path, after_attempt: int = 0) -> End | None:
    """Return how the rank ended that failed first in the newest attempt.

    Args:
        run_dir: The run folder.
        after_attempt: Look only at later attempts.

    Returns:
        None if no rank of that attempt ended otherwise than it should, as far as is known.
    """
    attempts = [number for number in attempts_of(run_dir) if number > after_attempt]
    ends = ends_of(run_dir, attempts[-1]) if attempts else []
    return ends[0] if ends else None


def describe_end(end: End) -> str:
    """Return what a launcher prints of a failure, traceback first, of several lines."""
    place = f"in {end.phase} of step {end.step}" if end.step else f"in {end.phase or 'start'}"
    status = "" if end.status is None else f", exit status {end.status}"
    head = f"rank {end.rank} on {end.host} {place} (attempt {end.attempt}{status}): {end.reason}"
    return "\n".join(part for part in (end.traceback.rstrip(), head) if part)


def is_of_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone or does not answer."""
    kind = type(error).__name__
    if kind in ("DistNetworkError", "DistStoreError"):
        return True
    if isinstance(error, BrokenPipeError):
        # Of our own output, which nobody reads any more; ranks talk through torch, in C++.
        return False
    return isinstance(error, (RuntimeError, ConnectionError)) and bool(
        _PEER_WORDS.search(str(error))
    )


def mark_recorded(error: BaseException, path: Path) -> None:
    """Note on an error where it is written."""
    error.add_note(f"{_RECORDED}{path}")


def record_of(error: BaseException) -> Path | None:
    """Return where an error is written; None if it is not."""
    notes: list[str] = getattr(error, "__notes__", [])
    found = [note for note in notes if note.startswith(_RECORDED)]
    return Path(found[0].removeprefix(_RECORDED)) if found else None


def is_told_later(error: BaseException) -> bool:
    """Whether an error is on record and a launcher is there who will print the first of them."""
    return record_of(error) is not None and bool(os.environ.get(LAUNCHER_VARIABLE))


def is_told_by_rank_0(error: BaseException) -> bool:
    """Whether rank 0 ends for the same reason as this rank, and will tell; waits a moment to see.

    What is not on record was raised before the attempt began, by all ranks together.
    """
    path = record_of(error)
    if path is None:
        return True
    first, end = path.with_name("rank-0.json"), time.monotonic() + _ALIKE_WITHIN
    while not first.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return (read_document(first) or {}).get("reason") == str(error)


def readable_traceback(error: BaseException) -> str:
    """Return the traceback of an error as text; values of variables are not in it."""
    return "".join(traceback.format_exception(error))
