"""When a save is due: every so many steps, or as often as costs least.

The clock is rank 0's and monotonic; the others learn of its decision in the exchange of a step.
"""

import time
from collections import deque
from collections.abc import Callable

from interlace.trainer.checkpoint.interval import Costs, interval_seconds
from interlace.trainer.config.checkpoint_section import CheckpointSection

REMEMBERED = 4
"""Saves whose costs are averaged."""

FIRST_SAVE_STEPS = 2
"""With `every = "auto"` a run saves early, to learn what that costs."""

UNKNOWN_SECONDS = 60.0
"""How long to wait after a save that failed while nothing is known yet."""

TOLD_CHANGE = 1.25
"""A new interval is told if it differs from the one that was told by this factor."""


class Pace:
    """Decides when to save.

    Args:
        settings: What the recipe says.
        steps: Steps of the whole run; the last state is saved in any case.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        settings: CheckpointSection,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.steps = steps
        self.clock = clock
        self.measured: deque[Costs] = deque(maxlen=REMEMBERED)
        self.steps_done = 0
        self.step_seconds = 0.0
        self.told_seconds = 0.0
        self._step_began = clock()
        self._save_began: float | None = None

    def step_done(self) -> None:
        """Take note of the end of a step; the time until the next call is one step's."""
        now = self.clock()
        # The first step compiles.
        if self.steps_done:
            self.step_seconds = now - self._step_began
        self.steps_done += 1
        self._step_began = now

    def begun(self) -> None:
        """Take note of the beginning of a save."""
        self._save_began = self.clock()

    @property
    def costs(self) -> Costs | None:
        """The mean over the newest saves, or None before the first."""
        if not self.measured:
            return None
        count = len(self.measured)
        return Costs(
            sum(each.stall for each in self.measured) / count,
            sum(each.persist for each in self.measured) / count,
        )

    @property
    def expected_seconds(self) -> float:
        """How long a save may take: as long as the longest of the newest ones; 0 before the
        first.
        """
        return max((each.persist for each in self.measured), default=0.0)

    @property
    def interval(self) -> float:
        """Seconds from the beginning of one save to that of the next, with `every = "auto"`."""
        if self.costs is None:
            return UNKNOWN_SECONDS
        return interval_seconds(self.costs, self.settings.hours_between_failures, self.step_seconds)

    def is_time(self) -> bool:
        """Whether, by this rank's clock, a save is due at the end of this step."""
        if self.settings.every != "auto":
            return False
        if self._save_began is None:
            return self.steps_done + 1 >= FIRST_SAVE_STEPS
        return self.clock() - self._save_began >= self.interval

    def is_due(self, step: int, agreed: bool) -> bool:
        """Whether the state after a step is saved; the same on all ranks.

        Args:
            step: Steps done, from the beginning of the run.
            agreed: Whether rank 0 found that it is time.
        """
        if step >= self.steps:
            return False
        if self.settings.every == "auto":
            return agreed
        every = self.settings.every_steps
        return bool(every) and step % every == 0

    def learn(self, costs: Costs) -> str | None:
        """Take note of what a save has cost; return what to tell a person, if that changes when the
        next is due.
        """
        self.measured.append(costs)
        if self.settings.every != "auto":
            return None
        interval, known = self.interval, self.told_seconds
        if known and 1 / TOLD_CHANGE < interval / known < TOLD_CHANGE:
            return None
        self.told_seconds = interval
        mean = self.costs
        assert mean is not None
        return (
            f"a checkpoint every {interval:,.0f} s from now on: a save stalls training "
            f"{mean.stall:.2f} s and takes {mean.persist:.1f} s, and a failure is expected every "
            f"{self.settings.hours_between_failures:g} h"
        )
