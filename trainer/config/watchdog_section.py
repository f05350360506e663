"""What is done about ranks that hang or fall behind."""

from typing import Annotated

from pydantic import Field

from interlace.trainer.config.section import NonNegativeFloat, Section


class WatchdogSection(Section):
    """How a run notices that a rank makes no progress, or makes it slowly."""

    seconds: NonNegativeFloat | None = None
    """Longest time in one phase of a step before all ranks are stopped and their stacks printed;
    ten times as much while compiling, loading, saving and validating. Unset means five times the
    longest seen, at least 120 s; 0 turns the watchdog off.
    """

    straggler_factor: Annotated[float, Field(ge=0.0)] = 1.5
    """A rank whose own work takes this many times the median rank's, over ten steps, is named once;
    0 names none.
    """
