"""How often to save, from what saves cost and how often runs fail.

A save that stalls training for `d` seconds every `T` seconds costs `d / T` of the time; a failure
costs half an interval of work on average, and what it takes to detect it and start again. With a
failure every `M` seconds the sum is least at `T = sqrt(2 d M)` (Young 1974; Daly 2006 has the next
terms, which do not matter while `d` is small against `M`). What it takes to persist in the
background moves no optimum, but a save has to be over before the next begins.
"""

import math
from dataclasses import dataclass

LONGEST_SECONDS = 30 * 60.0
"""However rare failures are stated to be: a person who stops a run loses no more."""


@dataclass(frozen=True)
class Costs:
    """What a save costs, in seconds.

    Attributes:
        stall: How long training stands still for it.
        persist: From its snapshot until it is committed, beside training.
    """

    stall: float
    persist: float


def interval_seconds(costs: Costs, hours_between_failures: float, step_seconds: float) -> float:
    """Return how many seconds should pass between the beginnings of two saves.

    Args:
        costs: Of the saves of this run.
        hours_between_failures: Mean time between failures of the whole run.
        step_seconds: Saves begin between steps only.
    """
    best = math.sqrt(2 * costs.stall * 3600 * hours_between_failures)
    return max(min(best, LONGEST_SECONDS), costs.persist, step_seconds)
