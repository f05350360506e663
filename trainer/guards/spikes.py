"""The spike rule: a step whose loss or gradient norm stands out far above the recent ones is left
out.

A value is a spike above `mean + sigmas * sigma` of the last accepted ones, once half a window of
them is there (as in Levanter and OLMo-core: 6 sigmas of 128). What is judged once is a function of
the memory alone, and the memory is part of a checkpoint, as exact floats: a resumed run skips what
an undisturbed one skips. All ranks know the same losses and norms, hence decide alike.

A value that was skipped does not enter the window. If it did, the first spike would widen sigma so
far that the next ones, which usually follow it closely, would pass. The price is that a lasting
rise is never learnt; that is what `guard.max_spikes` stops the run for.
"""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

STOP_WITHIN = 50
"""Steps within which `guard.max_spikes` skips stop a run."""

ROUNDING = 1e-6
"""Least sigma, as a share of the mean: a series that stands still has none, and the rounding of its
mean would be a spike."""


class SpikeMemory(BaseModel):
    """What the rule remembers after some step; part of every checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...] = ()
    """Losses of the last accepted steps, oldest first, nats per token."""

    norms: tuple[float, ...] = ()
    """Their global gradient norms."""

    skipped: int = 0
    """Steps skipped as spikes in the whole run."""

    recent: tuple[int, ...] = ()
    """Those, from 1, that are less than `STOP_WITHIN` steps old."""

    def accepted(self, loss: float, norm: float, window: int) -> "SpikeMemory":
        """Return the memory after a step that was not skipped, with finite numbers."""
        losses, norms = (*self.losses, loss)[-window:], (*self.norms, norm)[-window:]
        return self.model_copy(update={"losses": losses, "norms": norms})

    def after_skip(self, step: int) -> "SpikeMemory":
        """Return the memory after a spike at `step`, from 1."""
        recent = (*(past for past in self.recent if step - past < STOP_WITHIN), step)
        return self.model_copy(update={"skipped": self.skipped + 1, "recent": recent})


def limit_of(values: Sequence[float], sigmas: float, window: int) -> float:
    """Return what the next value must not exceed: infinity before half a window is there.

    Args:
        values: The last accepted ones.
        sigmas: Allowed distance from their mean, in (sample) standard deviations.
        window: Most of them that count.
    """
    recent = values[-window:]
    if len(recent) < max(2, window // 2):
        return math.inf
    mean = math.fsum(recent) / len(recent)
    squares = math.fsum((value - mean) ** 2 for value in recent)
    sigma = math.sqrt(squares / (len(recent) - 1))
    return mean + sigmas * max(sigma, ROUNDING * abs(mean))


def spike_in(
    memory: SpikeMemory, loss: float, norm: float, sigmas: float, window: int
) -> str | None:
    """Return what makes a step a spike, in words, or None; `sigmas` 0 turns the rule off."""
    if not sigmas:
        return None
    for name, value, past in (("loss", loss, memory.losses), ("gradient norm", norm, memory.norms)):
        limit = limit_of(past, sigmas, window)
        if value > limit:
            return f"{name} {value:.4g} is above {limit:.4g}"
    return None
