"""Which checkpoints stay, and how the others go: renamed into trash/ first, deleted afterwards.

A rename is instantaneous, so a process killed in the middle leaves whole checkpoints and something
in trash/, never a checkpoint with some files missing. What cannot be deleted is reported as text: a
full or failing disk must not stop a training run that has just saved.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.checkpoint import verify
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.files import remove_tree, sync_folder
from interlace.trainer.errors import CheckpointError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """What was done: the steps that are no longer committed, and what could not be deleted."""

    removed: tuple[int, ...]
    problems: tuple[str, ...]


def steps_to_remove(steps: Sequence[int], keep_last: int, keep_every_steps: int) -> tuple[int, ...]:
    """Return the steps that need not stay, oldest first.

    Args:
        steps: The committed steps, ascending.
        keep_last: The newest so many stay; at least 1.
        keep_every_steps: Multiples of this stay for good; 0 for none.
    """
    assert keep_last >= 1, "the newest checkpoint always stays"
    return tuple(
        step for step in steps[:-keep_last] if not keep_every_steps or step % keep_every_steps
    )


def remove_old(checkpoints: Path, keep_last: int, keep_every_steps: int) -> Retention:
    """Remove the committed steps that `steps_to_remove` names; errors of the disk are returned."""
    try:
        committed = verify.list_steps(checkpoints)
    except CheckpointError as error:
        return Retention((), (str(error),))
    doomed = steps_to_remove(committed, keep_last, keep_every_steps)
    if not doomed:
        return Retention((), ())
    trash = checkpoints / "trash"
    # A name left in trash/ by an earlier attempt would be in the way of the rename.
    problems = empty_trash(checkpoints)
    removed: list[int] = []
    try:
        for step in doomed:
            verify.step_folder(checkpoints, step).rename(trash / verify.step_name(step))
            removed.append(step)
            failpoint("retain.mid")
        sync_folder(checkpoints / "committed")
        sync_folder(trash)
        failpoint("retain.mid")
    except OSError as error:
        problems.append(f"could not move old checkpoints to {trash}: {error}")
    problems += empty_trash(checkpoints)
    _LOG.info("removed the checkpoints of steps %s", removed)
    return Retention(tuple(removed), tuple(problems))


def empty_trash(checkpoints: Path) -> list[str]:
    """Delete whatever lies in trash/; return what could not be deleted."""
    trash = checkpoints / "trash"
    try:
        return remove_all(sorted(trash.iterdir()))
    except OSError as error:
        return [f"could not list {trash}: {error.strerror}"]


def discard(checkpoints: Path, folders: Sequence[Path]) -> list[str]:
    """Move folders to trash/, each in one instant, and delete them; return what failed."""
    problems = empty_trash(checkpoints)
    for folder in folders:
        try:
            folder.rename(checkpoints / "trash" / folder.name)
        except FileNotFoundError:
            # Its owner removed it just now.
            continue
        except OSError as error:
            problems.append(f"could not move {folder} to trash: {error.strerror}")
    return problems + empty_trash(checkpoints)


def remove_all(paths: Sequence[Path]) -> list[str]:
    """Delete folders and files; return what could not be deleted."""
    return [problem for path in paths if (problem := remove_tree(path))]
