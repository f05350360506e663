"""`interlace launch torchrun`: ranks on this machine, or this machine's part of several.

torchrun (torch.distributed.run) starts the ranks and lets them find each other; who starts it again
after a failure is `supervising`, since torchrun would repeat a mistake in a recipe as eagerly as it
replaces a dead machine. Every rank runs `python -m interlace.launch.torchrun RECIPE`, as in job
scripts that call torchrun themselves.
"""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from interlace.launch.launchers.request import FixedRun, fixed_run, positive, refuse
from interlace.launch.launchers.supervising import Process, say, supervise
from interlace.trainer.config.load import Recipe
from interlace.trainer.ends import LAUNCHER_VARIABLE
from interlace.trainer.starts import RESTART_VARIABLE

RANK_MODULE = "interlace.launch.torchrun"
PORTS = 16
"""Each start of several machines meets at a port of its own, so that none meets the last one."""


@dataclass(frozen=True)
class Ranks:
    """What torchrun is asked for.

    Attributes:
        run: The run.
        per_node: Ranks of this machine.
        nodes: Machines.
        node_rank: This one's number, the machine where they meet being 0; None leaves it to them.
        meeting: Host and first port where several machines meet; None for one.
    """

    run: FixedRun
    per_node: int
    nodes: int
    node_rank: int | None
    meeting: tuple[str, int] | None

    def words(self, attempt: int) -> list[str]:
        """Return torchrun's words for the so-manieth start."""
        words = [f"--nproc-per-node={self.per_node}"]
        if self.meeting is None:
            words += ["--standalone", "--local-addr=127.0.0.1"]
        else:
            host, port = self.meeting
            place = f"{host}:{port + attempt % PORTS}"
            words += [f"--nnodes={self.nodes}", f"--rdzv-endpoint={place}"]
            words.append(f"--rdzv-id={self.run.folder.name}-{attempt}")
            # Without numbers ranks are in the order in which machines arrive.
            numbered = ["--rdzv-backend=static", f"--node-rank={self.node_rank}"]
            words += ["--rdzv-backend=c10d"] if self.node_rank is None else numbered
        return [*words, "-m", RANK_MODULE, *self.run.words]

    def environment(self, attempt: int) -> Mapping[str, str]:
        """Return the environment of this machine's ranks at the so-manieth start."""
        own = {**os.environ, LAUNCHER_VARIABLE: "torchrun"}
        # A job that went back to the queue has been started before.
        own[RESTART_VARIABLE] = str(attempt + int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        if "OMP_NUM_THREADS" not in own:
            # torchrun would set 1 for all of them, whatever the machine has.
            own["OMP_NUM_THREADS"] = str(threads_of_each(self.per_node))
        # Named here once more, since what defines it loads torch: interlace.offload.cores.
        own["INTERLACE_HOST_CORES"] = ",".join(str(core) for core in usable_cores())
        if self.meeting is None and sys.platform == "linux":
            # Ranks of one machine have no business on its network.
            own.setdefault("GLOO_SOCKET_IFNAME", "lo")
            own.setdefault("NCCL_SOCKET_IFNAME", "lo")
        return own

    def start(self, attempt: int) -> Process:
        """Start the ranks; not in the terminal's group, so that signals reach them once."""
        return subprocess.Popen(
            [sys.executable, "-m", "interlace.launch.launchers.elastic", *self.words(attempt)],
            env=self.environment(attempt),
            start_new_session=True,
        )


def launch_torchrun(arguments: Namespace, recipe: Recipe) -> int:
    """Start ranks, and start them again while that may help; return the exit status."""
    ranks = ranks_of(arguments, recipe)
    many = "1 rank" if ranks.per_node == 1 else f"{ranks.per_node} ranks"
    say(f"{many} on this machine, run folder {ranks.run.folder}")
    return supervise(ranks.start, ranks.run.folder, arguments.max_restarts)


def ranks_of(arguments: Namespace, recipe: Recipe) -> Ranks:
    """Return what the words ask for.

    Raises:
        ConfigError: They contradict each other or cannot be read.
    """
    nodes = arguments.nnodes
    problems = positive("--nnodes", nodes)
    if arguments.max_restarts < 0:
        problems.append(f"--max-restarts {arguments.max_restarts}: must be 0 or more")
    meeting, problem = meeting_of(arguments.rdzv, nodes)
    problems += problem
    number = arguments.node_rank
    if number is not None and not 0 <= number < nodes:
        problems.append(f"--node-rank {number}: must be from 0 to {nodes - 1} (--nnodes {nodes})")
    if nodes > 1 and not recipe.config.run.dir:
        problems.append(
            f"--nnodes {nodes}: the machines must agree on the run folder; type run.dir= and a "
            "folder that all of them see"
        )
    per_node, problem = ranks_here(arguments.nproc)
    refuse([*problems, *problem])
    return Ranks(fixed_run(arguments, recipe), per_node, nodes, number, meeting)


def meeting_of(text: str | None, nodes: int) -> tuple[tuple[str, int] | None, list[str]]:
    """Return host and port of `HOST:PORT` and what is wrong with it."""
    if text is None:
        if nodes <= 1:
            return None, []
        return None, [
            f"--nnodes {nodes}: the machines need a place to meet; type --rdzv HOST:PORT with a "
            "free port of one of them, the same on all"
        ]
    if nodes == 1:
        return None, [f"--rdzv {text}: one machine meets nobody; leave it out, or type --nnodes M"]
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535 - PORTS:
        return None, [f"--rdzv {text}: cannot be read; type HOST:PORT, as in node1:29400"]
    return (host, int(port)), []


def ranks_here(text: str) -> tuple[int, list[str]]:
    """Return how many ranks this machine gets and what is wrong with the words."""
    if text.isdecimal() and int(text) > 0:
        return int(text), []
    if text not in ("gpu", "auto"):
        return 1, [f"--nproc {text}: must be a number of ranks, gpu or auto"]
    import torch

    gpus = torch.cuda.device_count()
    if text == "gpu" and gpus == 0:
        return 1, ["--nproc gpu: there is no GPU that torch can use; type --nproc and a number"]
    return max(1, gpus), []


def threads_of_each(ranks: int) -> int:
    """Return the threads that each of so many ranks of this machine computes with."""
    return max(1, len(usable_cores()) // ranks)


def usable_cores() -> list[int]:
    """Return the cores that this process may run on; `interlace.offload.cores` says the same, but
    loads torch.
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
