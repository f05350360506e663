"""All checks in their order, and how they are run on one mixer.

A check that raises has failed: what was raised, and where in the mixer's file, stands in its place.
"""

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.config.checks import validate
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.conformance import behaviour, costs, decoding, gradients, parameters
from interlace.trainer.conformance.outcome import Outcome, Report, Result
from interlace.trainer.conformance.subject import Subject

SMALL = {
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "layers": 2,
    "mamba_head_width": 16,
    "mamba_state_width": 16,
    "moe_experts": 4,
}
"""Settings of `[model]` that are tried unless others are asked for: small, and nothing trivial."""


@dataclass(frozen=True)
class Check:
    """One promise and the function that holds a mixer to it; the promise is its docstring."""

    name: str
    run: Callable[[Subject], Outcome]

    @property
    def promise(self) -> str:
        """What is promised."""
        return " ".join((self.run.__doc__ or "").split())


CHECKS = (
    Check("declarations", parameters.declarations),
    Check("parameter count", costs.parameter_count),
    Check("roles", parameters.roles),
    Check("row blocks", parameters.row_blocks),
    Check("residual", parameters.residual),
    Check("initial values", parameters.initial_values),
    Check("shapes", behaviour.shapes),
    Check("bfloat16", behaviour.bfloat16),
    Check("causality", behaviour.causality),
    Check("reach", behaviour.reach),
    Check("rows", behaviour.rows),
    Check("documents", behaviour.documents),
    Check("first derivative", gradients.first_derivative),
    Check("second derivative", gradients.second_derivative),
    Check("step by step", decoding.step_by_step),
    Check("prompt in parts", decoding.prompt_in_parts),
    Check("fresh cache", decoding.fresh_cache),
    Check("cache contract", decoding.cache_contract),
    Check("cache bytes", decoding.cache_bytes),
    Check("FLOPs", costs.flops),
    Check("saved bytes", costs.saved_bytes),
    Check("product bytes", costs.product_bytes),
    Check("checkpoint", parameters.checkpoint),
)


def trial_shape(letter: str, given: Mapping[str, object]) -> ModelSection:
    """Return the `[model]` table to try a mixer at: small, but for the settings that are given.

    Raises:
        ConfigError: A setting is refused; every one that is.
    """
    return validate({"model": {**SMALL, "pattern": letter, **given}}).model


def conform(letter: str, config: ModelSection) -> Report:
    """Hold the mixer of a letter to everything it declares, at the shape of `config`, whose pattern
    is the letter.

    Raises:
        ConfigError: Nothing is registered under the letter.
    """
    subject = Subject(letter, config)
    results = tuple(
        Result(check.name, check.promise, outcome_of(check, subject)) for check in CHECKS
    )
    return Report(letter, subject.name, results)


def outcome_of(check: Check, subject: Subject) -> Outcome:
    """Run one check; what it raises is its failure."""
    try:
        return check.run(subject)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        own = [each for each in traceback.extract_tb(error.__traceback__) if is_own(each, subject)]
        place = own[-1] if own else frame
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        where = f"raised in {Path(place.filename).name}, line {place.lineno}"
        line = f" ({place.line})" if place.line else ""
        return Outcome("failed", said, "no error", f"{where}{line}")


def is_own(frame: traceback.FrameSummary, subject: Subject) -> bool:
    """Whether a line of a traceback is in the file of the mixer's class."""
    module = sys.modules.get(subject.kind.__module__)
    return module is not None and getattr(module, "__file__", None) == frame.filename
