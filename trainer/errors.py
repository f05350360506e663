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


class NumericsError(UserError):
    """Too many steps in a row with a loss or gradient that is not finite; names the evidence
    folder.
    """
