"""Bring your own block and get the tests free: every promise of a mixer is held against what it
does.

A check is a small function of a `Subject`, which builds the mixer as training builds it, and
returns an `Outcome`: what was measured, what it must be, and where to look if it is not. `suite.py`
lists them; `interlace conform mixer NAME` runs them.
"""

from interlace.trainer.conformance.outcome import Outcome, Report, Result
from interlace.trainer.conformance.suite import CHECKS, conform, trial_shape

__all__ = ["CHECKS", "Outcome", "Report", "Result", "conform", "trial_shape"]
