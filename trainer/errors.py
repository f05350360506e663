"""Errors that a person can act on.

Everything derived from `UserError` is a mistake or a condition outside the program: the command
line prints its message without a traceback and exits with status 2. Any other exception is a defect
of ours: it keeps its traceback and exits with status 1. A message says what, got which value, why
it matters, what to type.
"""

from collections.abc import Sequence


class UserError(ValueError):
    """A condition that the user can mend; the message says how."""


class ConfigError(UserError):
    """One or more problems of a recipe, reported together.

    Args:
        problems: One readable message each: key, value, reason, remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A corpus that cannot be read, prepared or trusted; names the file and the row."""


class CheckpointError(UserError):
    """A checkpoint or run folder that is missing, broken or incompatible; names the file."""


class SaveError(UserError):
    """A checkpoint that could not be written (disk full, no permission); training may go on."""


class StorageError(SaveError):
    """Nothing could be saved for so long that going on would risk too much work."""


class Preempted(UserError):
    """Asked to stop, and there was no time left to save; the newest checkpoint is what there is."""


class NumericsError(UserError):
    """Losses, gradients or bits that cannot be right; names the evidence folder."""


class Stalled(UserError):
    """A rank made no progress for longer than allowed."""


class MemoryShort(UserError):
    """Host or device memory ran out while training."""


class NoProgress(UserError):
    """Several starts of a run in a row ended at the step they began with."""
