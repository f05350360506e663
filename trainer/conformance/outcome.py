"""What a check finds: a promise kept, a promise broken with figures and advice, or one that was
never made.
"""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["passed", "failed", "does not apply"]


@dataclass(frozen=True)
class Outcome:
    """The finding of one check.

    Attributes:
        verdict: Whether the promise is kept.
        measured: What was found, in words and figures.
        bound: What it may be at most, or must be.
        advice: What to look at where it failed; why where it does not apply.
    """

    verdict: Verdict
    measured: str = ""
    bound: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Result:
    """One line of a report: a check, what it holds a mixer to, and what it found."""

    check: str
    promise: str
    outcome: Outcome


@dataclass(frozen=True)
class Report:
    """All findings on one mixer.

    Attributes:
        letter: Its letter.
        name: Its name.
        results: In the order of the checks.
    """

    letter: str
    name: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> list[Result]:
        """The promises that are broken."""
        return [result for result in self.results if result.outcome.verdict == "failed"]


def judged(kept: bool, measured: str, bound: str, advice: str) -> Outcome:
    """Return a pass, or a failure that says what to do."""
    return Outcome("passed" if kept else "failed", measured, bound, "" if kept else advice)


def exempt(reason: str) -> Outcome:
    """Return that a check does not apply, and why."""
    return Outcome("does not apply", advice=reason)
