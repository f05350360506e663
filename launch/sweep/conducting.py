"""Carries out a sweep: asks what is needed, takes what the store has, lets the rest be run.

Who runs a trial is a `Runner`: processes of this machine (`workers`) or Ray Tune (`ray_tune`). The
decisions are those of `search`, so both give the same table.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from interlace.launch.sweep.search import Line, lines, needed
from interlace.launch.sweep.store import Result, Store
from interlace.launch.sweep.trials import Space, Trial

REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A trial that is to be run: what it is, its digest, and its recipe as JSON has it."""

    trial: Trial
    key: str
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a trial ended: with its result, or with a problem in words."""

    job: Job
    result: Result | None
    problem: str = ""


class Runner(Protocol):
    """Whoever runs trials."""

    def room(self) -> int:
        """Return how many more trials can be started now."""
        ...

    def start(self, job: Job) -> None:
        """Start a trial; there is room."""
        ...

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return what has ended, waiting for so long at most."""
        ...

    def close(self) -> None:
        """Stop whatever still runs."""
        ...


@dataclass
class State:
    """How far a sweep is.

    Attributes:
        space: What it may try.
        store: Where results are kept.
        results: Of every finished trial.
        failures: Of every crashed one, in words.
        running: Those that run now.
        fresh: Finished trials that were run, not found.
        jobs: Digest and recipe of every trial that was needed so far.
    """

    space: Space
    store: Store
    results: dict[Trial, Result] = field(default_factory=dict[Trial, Result])
    failures: dict[Trial, str] = field(default_factory=dict[Trial, str])
    running: set[Trial] = field(default_factory=set[Trial])
    fresh: int = 0
    jobs: dict[Trial, Job] = field(default_factory=dict[Trial, Job])

    @property
    def outcomes(self) -> dict[Trial, float | None]:
        """Loss of every trial that ended; None for a crash."""
        losses: dict[Trial, float | None] = {t: result.loss for t, result in self.results.items()}
        return losses | dict.fromkeys(self.failures, None)

    def needed(self) -> list[Trial]:
        """Return the trials that are needed and have not ended."""
        return needed(self.space.request, self.space.seeds, self.outcomes)

    def lines(self) -> list[Line]:
        """Return every width of every family, as far as it is known."""
        return lines(self.space.request, self.space.seeds, self.outcomes)

    def job_of(self, trial: Trial) -> Job:
        """Return digest and recipe of a trial; folders in it hold wherever it runs."""
        if trial not in self.jobs:
            recipe = self.space.config_of(trial).model_dump(mode="json")
            prepared = Path(recipe["data"]["prepared_dir"]).expanduser()
            recipe["data"]["prepared_dir"] = os.fspath(prepared.absolute())
            self.jobs[trial] = Job(trial, self.space.key_of(trial), recipe)
        return self.jobs[trial]

    def look_up(self) -> list[Trial]:
        """Take what the store has until it has no more; return what is needed then."""
        looked: set[Trial] = set()
        while True:
            wanted = self.needed()
            found = False
            for trial in wanted:
                if trial in looked or trial in self.running:
                    continue
                looked.add(trial)
                result = self.store.read(self.job_of(trial).key)
                if result is not None:
                    self.results[trial] = result
                    found = True
            if not found:
                return wanted


def conduct(state: State, runner: Runner, show: Callable[[State], None]) -> None:
    """Run a sweep to its end.

    Args:
        state: Where it begins; changed in place.
        runner: Whoever runs trials.
        show: Told whenever something may have changed.
    """
    wanted = state.look_up()
    while wanted:
        for trial in wanted:
            if runner.room() > 0 and trial not in state.running:
                runner.start(state.job_of(trial))
                state.running.add(trial)
        show(state)
        ended = runner.wait(REFRESH_SECONDS)
        for each in ended:
            state.running.discard(each.job.trial)
            if each.result is None:
                state.failures[each.job.trial] = each.problem
            else:
                state.results[each.job.trial] = each.result
                state.fresh += 1
        if ended:
            wanted = state.look_up()
    show(state)
