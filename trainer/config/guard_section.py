"""The `[guard]` table: which steps are left out although their numbers are finite, and how a run
checks its own arithmetic and memory.
"""

from typing import Annotated

from pydantic import Field

from interlace.trainer.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class GuardSection(Section):
    """What a run does about numbers that are finite and still cannot be right."""

    spike_sigmas: NonNegativeFloat = 0.0
    """Skip the update of a step whose loss or gradient norm is more than so many standard
    deviations above the mean of the recent ones; 6 is usual, 0 turns it off. Off by default: small
    batches have such steps without any fault, and a sweep must see which learning rates diverge.
    """

    spike_window: Annotated[PositiveInt, Field(ge=4)] = 128
    """Steps that count as recent, skipped ones left out; nothing is skipped before there are half
    as many.
    """

    max_spikes: PositiveInt = 3
    """Skips within 50 steps that stop the run: then it is no outlier any more."""

    recompute_every_steps: NonNegativeInt = 0
    """Steps between those of which one micro-batch is computed twice; loss and gradients must agree
    bit for bit, or the run stops with a report. 0 turns it off. It needs kernels that repeat
    themselves, and costs one pass and host memory for two gradients.
    """

    check_state_every_steps: NonNegativeInt = 0
    """Steps between those after which optimizer state on the host is checksummed, to be compared
    before the next update; what has changed stops the run with a report. 0 turns it off.
    """
