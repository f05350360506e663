"""The `[checkpoint]` section of a recipe: when state is saved, and which checkpoints stay."""

from typing import Annotated

from pydantic import Field

from interlace.trainer.config.section import NonNegativeInt, PositiveFloat, Section


class CheckpointSection(Section):
    """When state is saved and which checkpoints stay."""

    every_steps: NonNegativeInt = 100
    """Steps between checkpoints; 0 saves at the end and on a signal only."""

    notice_seconds: PositiveFloat = 30.0
    """Time between SIGTERM and the end; a save that would take longer than what is left of it is
    not begun, and the run stops at its newest checkpoint.
    """

    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that stay."""

    keep_every_steps: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this stay for good; 0 keeps none beyond the
    newest.
    """
