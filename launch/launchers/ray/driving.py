"""Lets Ray Train run the ranks, until the run has ended.

`TorchTrainer.fit` waits in a thread of its own, while the terminal prints what comes over the
bridge and hears signals. Ray Train starts ranks again that fail. A rank that ends for a reason that
no new start can cure ends the run; one that stops in order to move is followed by another fit.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.launch.launchers.ray.bridge import open_bridge
from interlace.launch.launchers.ray.cluster import Cluster
from interlace.launch.launchers.ray.request import Request, even_counts
from interlace.launch.launchers.ray.terminal import Terminal
from interlace.launch.launchers.ray.worker import Errand, run_rank
from interlace.trainer.world import COLLECTIVE_TIMEOUT


@dataclass
class Fit:
    """Ray Train at work in a thread.

    Attributes:
        trainer: What does the work.
        failure: What it raised, once it is over.
    """

    trainer: Any
    failure: BaseException | None = None
    thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it is still at work."""
        return self.thread is not None and self.thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self.thread = threading.Thread(target=self.work, daemon=True, name="fit")
        self.thread.start()

    def work(self) -> None:
        """Run the trainer; keep what it raises."""
        try:
            self.trainer.fit()
        except BaseException as error:
            self.failure = error


def drive(request: Request, run_dir: Path, cluster: Cluster) -> int:
    """Run the ranks until the run has ended; return the exit status."""
    bridge = open_bridge()
    terminal = Terminal(bridge, run_dir, cluster.output)
    with terminal.hearing_signals():
        while True:
            fit = Fit(trainer_of(request, run_dir, cluster, bridge))
            fit.start()
            terminal.watch(lambda fit=fit: fit.running)
            if not terminal.moving or fit.failure is not None:
                return terminal.status(fit.failure)


def trainer_of(request: Request, run_dir: Path, cluster: Cluster, bridge: Any) -> Any:
    """Return the trainer of Ray Train for a request; its name is new, since Ray Train would take
    one that it knows for finished.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    tables = request.config.model_dump(mode="json", exclude_none=True)
    tables["run"]["dir"] = str(run_dir)
    errand = Errand(tables, str(request.folder), bridge)
    scaling = scaling_of(request, cluster)
    backend = "cpu:gloo,cuda:nccl" if cluster.gpus else "gloo"
    arguments: dict[str, Any] = {
        "train_loop_per_worker": run_errand,
        "train_loop_config": {"errand": errand},
        "torch_config": TorchConfig(
            backend=backend, timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())
        ),
        "scaling_config": scaling,
        "run_config": RunConfig(
            name=f"{request.config.run.name}-{time.time_ns()}",
            storage_path=str(cluster.scratch / "records"),
            failure_config=FailureConfig(
                max_failures=request.max_failures, max_preemption_failures=-1
            ),
        ),
    }
    if not cluster.workers.elastic:
        return TorchTrainer(**arguments)
    from interlace.launch.launchers.ray.growing import ElasticTrainer, EvenPolicy

    counts = even_counts(request.config, cluster.workers)
    return ElasticTrainer(EvenPolicy(scaling, counts, bridge), **arguments)


def scaling_of(request: Request, cluster: Cluster) -> Any:
    """Return how many ranks there are and what each reserves, as Ray Train wants it."""
    from ray.train import ScalingConfig

    workers, gpu = cluster.workers, cluster.gpus > 0
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if gpu else {})
    return ScalingConfig(
        num_workers=(workers.least, workers.most) if workers.elastic else workers.most,
        use_gpu=gpu,
        resources_per_worker=resources,
        placement_strategy=request.placement,
        elastic_resize_monitor_interval_s=request.resize_seconds,
    )


def run_errand(config: dict[str, Any]) -> str:
    """Call `run_rank`, in the form that Ray Train wants."""
    return run_rank(config["errand"])
