"""How a process ends: one status for every reason that a launcher can act on.

Above 2 the numbers are those of sysexits.h where it has a fitting one. A launcher starts a run
again on every status that `restartable` names; the others would only repeat themselves.
"""

from enum import IntEnum

from interlace.trainer.checkpoint.commit import Superseded
from interlace.trainer.errors import (
    MemoryShort,
    NoProgress,
    NumericsError,
    Preempted,
    Stalled,
    StorageError,
    UserError,
)


class Exit(IntEnum):
    """Exit statuses of `interlace` and of every rank that it starts."""

    DONE = 0
    """Finished, or stopped on request (Ctrl-C, SIGTERM) with the state saved."""

    DEFECT = 1
    """A failure of ours; the traceback tells where."""

    MISTAKE = 2
    """Something that a person can mend; the message says how."""

    NUMERICS = 65
    """Losses or gradients that cannot be right: not finite or too high too often, or bits that
    changed when a step was repeated."""

    SUPERSEDED = 69
    """The run was started again, and this process is of the older start: it must not save."""

    STALLED = 70
    """A rank made no progress for longer than `watchdog.seconds`; the stacks tell where."""

    MEMORY = 71
    """Host or device memory ran out."""

    NO_PROGRESS = 73
    """Several starts in a row ended at the step they began with."""

    STORAGE = 74
    """Nothing could be saved, however often it was tried."""

    PREEMPTED = 75
    """Stopped on request, but too late to save: the newest checkpoint is what there is."""

    INTERRUPTED = 130
    """A second Ctrl-C, or one before the first step."""


RESTARTABLE = frozenset({Exit.DEFECT, Exit.STALLED, Exit.MEMORY, Exit.PREEMPTED})
"""What a new start may cure; so may an end by a signal, which has no status of its own."""


def status_of(error: UserError) -> Exit:
    """Return the exit status of an error whose message is for a person."""
    for kind, status in _STATUSES.items():
        if isinstance(error, kind):
            return status
    return Exit.MISTAKE


_STATUSES: dict[type[UserError], Exit] = {
    NumericsError: Exit.NUMERICS,
    Superseded: Exit.SUPERSEDED,
    Stalled: Exit.STALLED,
    MemoryShort: Exit.MEMORY,
    NoProgress: Exit.NO_PROGRESS,
    StorageError: Exit.STORAGE,
    Preempted: Exit.PREEMPTED,
}
