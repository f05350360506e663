"""Diagnostics, one small file each: numbers about a step that only some runs want.

A recipe lists them as `observe.diagnostics`. The loop asks them after backward, before the update,
in the steps whose line is printed; what they return goes into the step's record and TensorBoard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

from interlace.trainer.registry import Registry

if TYPE_CHECKING:
    from interlace.trainer.checkpoint.state import TrainingState
    from interlace.trainer.config.schema import RunConfig


class Diagnostic(Protocol):
    """Looks at a run while it trains; must leave everything as it is."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None: ...

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return numbers by name for the record of `step` (from 1); every rank takes part, and rank
        0's numbers are written. The optimizer has the whole gradient.
        """
        ...


DIAGNOSTICS: Registry[type[Diagnostic]] = Registry(
    "diagnostic",
    "observe.diagnostics",
    {"gradient_norms": "interlace.trainer.diagnostics.gradient_norms"},
)

DiagnosticClass = TypeVar("DiagnosticClass", bound=type[Diagnostic])


def diagnostic(name: str) -> Callable[[DiagnosticClass], DiagnosticClass]:
    """Register a class as the diagnostic that recipes call by this name."""
    return DIAGNOSTICS.register(name)


def diagnostics_of(config: RunConfig, state: TrainingState) -> list[Diagnostic]:
    """Return the diagnostics that a recipe lists."""
    return [DIAGNOSTICS.get(name)(config, state) for name in config.observe.diagnostics]
