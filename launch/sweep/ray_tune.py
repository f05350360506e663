"""Trials under Ray Tune: the same trials, the same store, on whatever Ray manages.

What is needed next depends on what came out, so Tune is handed one round of trials after another; a
round ends when all of its trials have. The store must be a folder that all nodes see. Ray is loaded
here and nowhere else.
"""

import importlib.util
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from interlace.launch.sweep.conducting import Ended, Job
from interlace.launch.sweep.running import last_lines
from interlace.launch.sweep.store import Store
from interlace.trainer.errors import ConfigError

ROUND = 10_000
"""Trials of one round at most."""


def check_ray() -> None:
    """Raise `ConfigError` if Ray Tune is not installed."""
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"--on ray: {' and '.join(missing)} cannot be imported; type  "
                "pip install 'interlace[ray]'  or leave --on ray out to use this machine's cores"
            ]
        )


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
    running: dict[str, Job] = field(default_factory=dict[str, Job])
    ended: SimpleQueue[Ended] = field(default_factory=SimpleQueue[Ended])
    round: threading.Thread | None = None
    failure: list[BaseException] = field(default_factory=list[BaseException])

    def __post_init__(self) -> None:
        check_ray()

    def room(self) -> int:
        """Return how many more trials can be started now: none while a round runs."""
        return 0 if self.round is not None else ROUND - len(self.waiting)

    def start(self, job: Job) -> None:
        """Put a trial into the next round."""
        self.waiting.append(job)

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return what has ended, waiting for so long at most; begin a round if none runs."""
        if self.round is None:
            self.running = {job.key: job for job in self.waiting}
            self.waiting = []
            self.round = threading.Thread(target=self.run_round, daemon=True)
            self.round.start()
        found: list[Ended] = []
        try:
            found.append(self.ended.get(timeout=seconds))
        except Empty:
            if not self.round.is_alive():
                found += self.close_round()
        return found

    def close_round(self) -> list[Ended]:
        """Return what a finished round has not told of yet."""
        self.round = None
        if self.failure:
            raise self.failure.pop()
        found: list[Ended] = []
        while not self.ended.empty():
            found.append(self.ended.get())
        rest = set(self.running) - {each.job.key for each in found}
        found += [
            self.told(self.running[key], "Ray ended without a result") for key in sorted(rest)
        ]
        self.running = {}
        return found

    def told(self, job: Job, problem: str) -> Ended:
        """Return how a trial ended, by what the store has of it."""
        result = self.store.read(job.key)
        if result is not None:
            return Ended(job, result)
        log = self.store.log_of(job.key)
        lines = [problem, *(f"    {line}" for line in last_lines(log)), f"    log: {log}"]
        return Ended(job, None, "\n".join(lines))

    def run_round(self) -> None:
        """Let Tune run all trials of a round."""
        try:
            self.tune()
        except Exception as error:
            self.failure.append(error)

    def tune(self) -> None:
        """Hand the trials to Tune and wait for the last of them."""
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        import ray
        from ray import tune

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        runner = self

        class Listener(tune.Callback):
            """Tells of every trial when it ends."""

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                """Take note of a finished trial."""
                runner.hear(trial, "it left no result")

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                """Take note of a crashed trial."""
                runner.hear(trial, "it crashed under Ray")

        requests = [
            {
                "key": job.key,
                "recipe": dict(job.recipe),
                "store": os.fspath(self.store.folder),
                "folder": os.fspath(Path.cwd()),
            }
            for job in self.running.values()
        ]
        resources = {"cpu": float(self.threads), "gpu": float(self.gpus)}
        tuner = tune.Tuner(
            tune.with_resources(ray_trial, resources),
            param_space={"request": tune.grid_search(requests)},
            tune_config=tune.TuneConfig(max_concurrent_trials=self.jobs),
            run_config=tune.RunConfig(
                storage_path=os.fspath(self.store.folder / "ray"), verbose=0, callbacks=[Listener()]
            ),
        )
        tuner.fit()

    def hear(self, trial: Any, problem: str) -> None:
        """Take note that Tune says a trial has ended."""
        job = self.running.pop(str(trial.config["request"]["key"]), None)
        if job is not None:
            self.ended.put(self.told(job, problem))

    def close(self) -> None:
        """Stop Ray, if it was started here."""
        import ray

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
