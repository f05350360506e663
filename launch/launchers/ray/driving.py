"""Lets Ray Train run the ranks, and shows in this terminal what they do.

`TorchTrainer.fit` waits in a thread of its own; the main thread prints what comes over the bridge
and hears signals. A rank that ends for a reason that a new start cannot cure ends the run here,
before Ray Train tries.
"""

import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interlace.launch.launchers.ray.bridge import Begun, Ending, News, answer, open_bridge
from interlace.launch.launchers.ray.cluster import Cluster
from interlace.launch.launchers.ray.request import Request
from interlace.launch.launchers.ray.worker import Errand, run_rank
from interlace.trainer.exits import RESTARTABLE, Exit

LISTEN_SECONDS = 0.5
GROUP_SECONDS = 120.0
"""Longest wait for a rank that does not answer."""


@dataclass
class Fit:
    """Ray Train at work in a thread.

    Attributes:
        failure: What it raised, once it is over.
    """

    failure: BaseException | None = None
    thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it is still at work."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, trainer: Any) -> None:
        """Begin."""
        self.thread = threading.Thread(target=self.fit, args=(trainer,), daemon=True)
        self.thread.start()

    def fit(self, trainer: Any) -> None:
        """Run the trainer; keep what it raises."""
        try:
            trainer.fit()
        except BaseException as error:
            self.failure = error


def drive(request: Request, run_dir: Path, cluster: Cluster) -> int:
    """Run the ranks until the run has ended; return the exit status."""
    bridge = open_bridge()
    fit = Fit()
    fit.start(trainer_of(request, run_dir, cluster, bridge))
    return Terminal(bridge).watch(fit)


def trainer_of(request: Request, run_dir: Path, cluster: Cluster, bridge: Any) -> Any:
    """Return the trainer of Ray Train for a request."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, gpu = cluster.workers, cluster.gpus > 0
    count = (workers.least, workers.most) if workers.elastic else workers.most
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = 1
    tables = request.config.model_dump(mode="json", exclude_none=True)
    tables["run"]["dir"] = str(run_dir)
    errand = Errand(tables, str(request.folder), bridge)
    return TorchTrainer(
        run_errand,
        train_loop_config={"errand": errand},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(GROUP_SECONDS)
        ),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=gpu,
            resources_per_worker=resources,
            placement_strategy=request.placement,
        ),
        run_config=RunConfig(
            name=f"{request.config.run.name}-{time.time_ns()}",
            storage_path=str(cluster.scratch / "records"),
            failure_config=FailureConfig(
                max_failures=request.max_failures, max_preemption_failures=-1
            ),
        ),
    )


def run_errand(config: dict[str, Any]) -> str:
    """Call `run_rank`, in the form that Ray Train wants."""
    return run_rank(config["errand"])


@dataclass
class Terminal:
    """What the launching process hears, prints and decides.

    Attributes:
        bridge: Handle of the bridge.
        endings: How ranks of the newest generation ended, so far.
        fatal: The first end that a new start cannot cure.
    """

    bridge: Any
    endings: list[Ending] = field(default_factory=list[Ending])
    fatal: Ending | None = None
    asked: signal.Signals | None = None

    def watch(self, fit: Fit) -> int:
        """Print and listen until the run has ended; return the exit status."""
        with self.hearing_signals():
            while fit.running and self.fatal is None:
                self.take(self.listen(LISTEN_SECONDS))
            self.take(self.listen(LISTEN_SECONDS))
        return self.status(fit)

    def listen(self, seconds: float) -> News:
        """Return what came over the bridge."""
        return answer(self.bridge.listen.remote(seconds))

    def take(self, news: News) -> None:
        """Print lines and note ends."""
        for begun in news.begun:
            self.endings.clear()
            if begun.seconds is not None:
                print(recovery_line(begun), flush=True)
        for line in news.lines:
            print(line, flush=True)
        for ending in news.endings:
            self.endings.append(ending)
            cured = ending.status in RESTARTABLE or ending.status == Exit.DONE
            if not cured and self.fatal is None:
                self.fatal = ending

    def status(self, fit: Fit) -> int:
        """Return the exit status; say why, if it is not 0."""
        if self.fatal is not None:
            print(f"interlace: {self.fatal.message}", file=sys.stderr)
            return self.fatal.status
        if fit.failure is not None:
            print(f"interlace: the run failed under Ray: {fit.failure}", file=sys.stderr)
            return Exit.DEFECT
        return max((ending.status for ending in self.endings), default=Exit.DEFECT)

    @contextmanager
    def hearing_signals(self) -> Generator[None]:
        """Hand the first stop signal to the ranks; leave at once on the second."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal and let the ranks know."""
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        print(
            f"\n{self.asked.name}: finishing this step and saving; once more exits at once",
            file=sys.stderr,
            flush=True,
        )
        self.bridge.stop.remote(self.asked.name, None)


def recovery_line(begun: Begun) -> str:
    """Return what is said when the training goes on."""
    return (
        f"attempt {begun.generation} resumed at step {begun.step} on {begun.ranks} ranks, "
        f"{begun.seconds:.0f} s after the failure, {begun.lost_steps} steps repeated"
    )
