"""The `[checkpoint]` section of a recipe: when state is saved, how, and which checkpoints stay."""

from typing import Literal

from interlace.trainer.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class CheckpointSection(Section):
    """When state is saved and which checkpoints stay."""

    every: Literal["steps", "auto"] = "steps"
    """Save every so many steps, or as often as costs least: from what saves cost in this run and
    how often it is expected to fail (Young 1974).
    """

    every_steps: NonNegativeInt = 100
    """With `every = "steps"`: steps between checkpoints; 0 saves at the end and on a signal only.
    """

    hours_between_failures: PositiveFloat = 24.0
    """With `every = "auto"`: mean time between failures of the whole run; of n machines it is an
    n-th of that of one.
    """

    asynchronous: bool = True
    """Write in the background while training goes on; false stands still until the checkpoint is
    committed.
    """

    copy_budget_gib: NonNegativeFloat | None = None
    """Host memory, per rank, for state that is updated before it is written; an update that finds
    none waits. Unset means a tenth of the state.
    """

    tries: PositiveInt = 4
    """How often a save is tried again, with training standing still, if it fails twice in a row or
    is the last one; after that the run stops.
    """

    retry_seconds: NonNegativeFloat = 2.0
    """Pause before the first of these tries; every further one is twice as long."""

    notice_seconds: PositiveFloat = 30.0
    """Time between SIGTERM and the end; a save that would take longer than what is left of it is
    not begun, and the run stops at its newest checkpoint.
    """

    keep_last: PositiveInt = 2
    """Newest checkpoints that stay."""

    keep_every_steps: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this stay for good; 0 keeps none beyond the
    newest.
    """
