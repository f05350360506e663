"""Diagnostics, one small file each: numbers about a step that only some runs want.

A recipe lists them as `observe.diagnostics`. The loop asks them after backward, before the update,
in the steps whose line is printed; what they return goes into the step's record and TensorBoard.
One that needs more says so by what else it has: the protocols below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from interlace.trainer.config.clip_checks import clips_coordinates
from interlace.trainer.registry import Registry

if TYPE_CHECKING:
    from interlace.trainer.batches import StepBatches
    from interlace.trainer.checkpoint.state import TrainingState
    from interlace.trainer.config.schema import RunConfig
    from interlace.trainer.objectives import Objective
    from interlace.trainer.observe.metrics import Histogram


class Diagnostic(Protocol):
    """Looks at a run while it trains; must leave everything as it is."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None: ...

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return numbers by name for the record of `step` (from 1); every rank takes part, and rank
        0's numbers are written. The optimizer has the whole gradient.
        """
        ...


@runtime_checkable
class AskedEveryStep(Protocol):
    """A diagnostic that is asked in every step, printed or not: it follows the gradients, or
    chooses its steps itself.
    """

    every_step: bool
    """True."""


@runtime_checkable
class AskedAfterUpdate(Protocol):
    """A diagnostic that looks at every step's update too."""

    def after_update(self, step: int) -> Mapping[str, float]:
        """Return numbers for the record of `step` (from 1), whose update may still be under way;
        every rank takes part.
        """
        ...


@runtime_checkable
class TakesLosses(Protocol):
    """A diagnostic that computes losses of its own."""

    def provide(self, objective: Objective, batches: StepBatches) -> None:
        """Take what a loss is made of; called once, before the first step."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A diagnostic with histograms for TensorBoard."""

    def histograms(self) -> Mapping[str, Histogram]:
        """Return those of the step that was asked about last, by name."""
        ...


@runtime_checkable
class LooksAtTensors(Protocol):
    """A diagnostic with a number for every tensor, too many for the record: for TensorBoard."""

    def of_tensors(self) -> Mapping[str, float]:
        """Return those of the step that was asked about last, by name."""
        ...


DIAGNOSTICS: Registry[type[Diagnostic]] = Registry(
    "diagnostic",
    "observe.diagnostics",
    {
        "gradient_norms": "interlace.trainer.diagnostics.gradient_norms",
        "gradient_histogram": "interlace.trainer.diagnostics.gradient_histogram",
        "clip_fraction": "interlace.trainer.diagnostics.clip_fraction",
        "directional_sharpness": "interlace.trainer.diagnostics.directional_sharpness",
        "critical_sharpness": "interlace.trainer.diagnostics.critical_sharpness",
    },
)

DiagnosticClass = TypeVar("DiagnosticClass", bound=type[Diagnostic])


def diagnostic(name: str) -> Callable[[DiagnosticClass], DiagnosticClass]:
    """Register a class as the diagnostic that recipes call by this name."""
    return DIAGNOSTICS.register(name)


def diagnostics_of(config: RunConfig, state: TrainingState) -> list[Diagnostic]:
    """Return the diagnostics that a recipe lists, and that of clipped coordinates where there are
    some.
    """
    wanted = dict.fromkeys(config.observe.diagnostics)
    if clips_coordinates(config):
        wanted["clip_fraction"] = None
    return [DIAGNOSTICS.get(name)(config, state) for name in wanted]
