"""Trials under Ray Tune: the same trials, the same store, on whatever Ray manages.

What is needed next depends on what came out, so Tune is handed one round of trials after another; a
round ends when all of its trials have. The store must be a folder that all nodes see. Ray is loaded
here and nowhere else.
"""

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interlace.launch.ray_extra import require_ray
from interlace.launch.sweep.conducting import Ended, Job
from interlace.launch.sweep.running import last_lines
from interlace.launch.sweep.store import Store

CLOSING_SECONDS = 30.0

ROUND = 10_000
"""Trials of one round at most."""


@dataclass
class RayRunner:
    """Runs trials as those of Ray Tune.

    Attributes:
        store: Where they keep results.
        jobs: Trials at a time.
        threads: CPUs of each.
        gpus: GPUs of each.
    """

    store: Store
    jobs: int
    threads: int
    gpus: int = 0
    waiting: list[Job] = field(default_factory=list[Job])
    running: list[Job] = field(default_factory=list[Job])
    round: threading.Thread | None = None
    failure: list[BaseException] = field(default_factory=list[BaseException])

    def __post_init__(self) -> None:
        require_ray("--on ray", "leave --on ray out to use this machine's cores")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        import ray

        # Here, not in a round: Ray's processes end with the thread that has started them.
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)

    def room(self) -> int:
        """Return how many more trials can be started now: none while a round runs."""
        return 0 if self.round is not None else ROUND - len(self.waiting)

    def start(self, job: Job) -> None:
        """Put a trial into the next round."""
        self.waiting.append(job)

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return what has ended, waiting for so long at most; begin a round if none runs.

        The store tells of results, wherever they come from; what has none when the round is over
        has crashed.
        """
        if self.round is None:
            self.running, self.waiting = self.waiting, []
            jobs = tuple(self.running)
            self.round = threading.Thread(target=self.run_round, args=(jobs,), daemon=True)
            self.round.start()
        self.round.join(seconds)
        over = not self.round.is_alive()
        if over:
            self.round = None
            if self.failure:
                raise self.failure.pop()
        read = [(job, self.store.read(job.key)) for job in self.running]
        self.running = [] if over else [job for job, result in read if result is None]
        return [
            Ended(job, result, "" if result is not None else self.crash_of(job))
            for job, result in read
            if result is not None or over
        ]

    def crash_of(self, job: Job) -> str:
        """Return what is known of a trial that left no result."""
        log = self.store.log_of(job.key)
        lines = [f"    {line}" for line in last_lines(log)]
        return "\n".join(["it crashed under Ray", *lines, f"    log: {log}"])

    def run_round(self, jobs: Sequence[Job]) -> None:
        """Let Tune run all trials of a round."""
        try:
            self.tune(jobs)
        except Exception as error:
            self.failure.append(error)

    def tune(self, jobs: Sequence[Job]) -> None:
        """Hand the trials to Tune and wait for the last of them."""
        from ray import tune

        requests = [
            {
                "key": job.key,
                "recipe": dict(job.recipe),
                "store": os.fspath(self.store.folder),
                "folder": os.fspath(Path.cwd()),
            }
            for job in jobs
        ]
        resources = {"cpu": float(self.threads), "gpu": float(self.gpus)}
        tuner = tune.Tuner(
            tune.with_resources(ray_trial, resources),
            param_space={"request": tune.grid_search(requests)},
            tune_config=tune.TuneConfig(max_concurrent_trials=self.jobs),
            run_config=tune.RunConfig(storage_path=os.fspath(self.store.folder / "ray"), verbose=0),
        )
        tuner.fit()

    def close(self) -> None:
        """Stop Ray; a round whose trials have all ended may finish its own records first."""
        import ray

        if self.round is not None and not self.running:
            self.round.join(CLOSING_SECONDS)
        if ray.is_initialized():
            ray.shutdown()


def ray_trial(config: dict[str, Any]) -> None:
    """Run one trial; Tune calls it in a process of its own."""
    import traceback

    from ray import tune

    from interlace.launch.sweep.running import run_trial

    request = config["request"]
    # Relative paths of a recipe are meant from where the sweep was started.
    os.chdir(request["folder"])
    store = Store(Path(request["store"]))
    log = store.log_of(request["key"])
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run_trial(store, request["key"], request["recipe"])
    except Exception:
        log.write_text(traceback.format_exc(), encoding="utf-8")
        raise
    tune.report({"diverged": bool(result.diverged), "steps": result.steps})
