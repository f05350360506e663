"""The starts of a run, and the rule that ends a run which gets nowhere.

A launcher starts a run again after a failure. If the failure comes back before anything is saved,
that would go on for ever and cost a machine for nothing. So three starts in a row that began at the
same committed step and failed are the end, unless a person asks for another: who types the command
has a reason (the disk is mended, a setting changed) and is never refused.

Every start is recorded beside the ends, in RUN/ends/attempt-N/start.json.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from interlace.trainer.ends import End, ends_folder, ends_of, read_document, write_document
from interlace.trainer.errors import NoProgress

MOST_IN_VAIN = 3
RESTART_VARIABLE = "INTERLACE_RESTART"
"""Set by a launcher, to anything but 0, for every start after its first."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The beginning of one attempt.

    Attributes:
        attempt: Its number, from 1.
        step: The newest committed step at that time; 0 if there was none.
        restart: Whether a launcher started it after a failure, not a person.
        world_size: Number of ranks.
        time: Seconds since 1970, for people.
    """

    attempt: int
    step: int
    restart: bool
    world_size: int
    time: float


def is_restart(environment: Mapping[str, str]) -> bool:
    """Whether a launcher (ours or torchrun) says that it starts the run again."""
    names = (RESTART_VARIABLE, "TORCHELASTIC_RESTART_COUNT")
    return any(environment.get(name, "0") not in ("", "0") for name in names)


def record_start(run_dir: Path, attempt: int, step: int, world_size: int) -> Start:
    """Write down that an attempt begins; called on rank 0 once it has its number."""
    restart = is_restart(os.environ)
    start = Start(
        attempt=attempt, step=step, restart=restart, world_size=world_size, time=time.time()
    )
    write_document(ends_folder(run_dir, attempt) / "start.json", asdict(start))
    return start


def read_start(run_dir: Path, attempt: int) -> Start | None:
    """Return what is on record of the start of an attempt; None if nothing is."""
    document = read_document(ends_folder(run_dir, attempt) / "start.json")
    names = {each.name for each in fields(Start)}
    return None if document is None or set(document) != names else Start(**document)


def require_progress(run_dir: Path, start: Start) -> None:
    """Do nothing if another start may help.

    Raises:
        NoProgress: A launcher asks for it, after `MOST_IN_VAIN` starts in a row that began at the
            same step and failed.
    """
    failed = failed_in_a_row(run_dir, start)
    if not start.restart or len(failed) < MOST_IN_VAIN:
        return
    endings = "\n".join(
        f"    attempt {attempt}: {in_short(end)}" for attempt, end in failed[-MOST_IN_VAIN:]
    )
    raise NoProgress(
        f"{len(failed)} starts in a row began at step {start.step} and failed before anything was "
        f"saved, so another would end like them:\n{endings}\n"
        f"What was saved before is untouched. When the cause is mended, go on with\n"
        f"    interlace train --resume {run_dir}"
    )


def failed_in_a_row(run_dir: Path, start: Start) -> list[tuple[int, End | None]]:
    """Return the attempts right before a start that began at its step, with the end of the rank
    that failed first, oldest first; none before the last one that a person started.

    One that was stopped on request has not failed: it is passed over.
    """
    found: list[tuple[int, End | None]] = []
    for attempt in range(start.attempt - 1, 0, -1):
        before = read_start(run_dir, attempt)
        if before is None or before.step != start.step:
            break
        ends = ends_of(run_dir, attempt)
        end = ends[0] if ends else None
        if end is None or end.kind != "stopped":
            found.append((attempt, end))
        if not before.restart:
            break
    return found[::-1]


def in_short(end: End | None) -> str:
    """Return in one line how an attempt ended."""
    if end is None:
        return "ended without a word (killed from outside, or its machine was lost)"
    where = f"step {end.step}, " if end.step else ""
    first = end.reason.strip().splitlines()[0] if end.reason.strip() else end.kind
    return f"rank {end.rank}, {where}{end.phase}: {first[:200]}"
