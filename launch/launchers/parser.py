"""The words of `interlace launch`; nothing heavy is loaded to explain them."""

import argparse

from interlace.launch.launchers.ray.parser import add_ray
from interlace.launch.launchers.words import AddParser, add_run_words, described

SUMMARY = "start a run on several processes, machines, or a cluster"

EXAMPLES = """\
All ways end in the same training loop: the same recipe on as many ranks gives the same losses. The
run folder is fixed before anything starts, and every start of the run, by whichever launcher,
continues from its newest intact checkpoint.

examples:
  interlace launch torchrun quickstart --nproc 2           two ranks of this machine
  interlace launch ray quickstart --workers 2              the same two under Ray
  interlace launch slurm gpt_1b_offload --nodes 4 --dry-run
  interlace launch kubernetes gpt_1b_offload --nodes 4 --image REPOSITORY/IMAGE:TAG --dry-run
  interlace launch skypilot gpt_1b_offload --nodes 2 --image REPOSITORY/IMAGE:TAG --dry-run

Exit statuses are those of the failing rank; docs/reliability.md has the table.
"""

TORCHRUN_EXAMPLES = """\
Ranks that fail for a reason that a new start may cure (a machine that died, a rank that hung) are
all started again from the newest checkpoint, after a pause that doubles each time. A mistake in the
recipe, or numbers that cannot be right, end the run at once. Ctrl-C and SIGTERM reach every rank:
they finish the step, save and leave with status 0.

Without --nproc there is one rank per GPU, and one without any. Each rank has its own share of the
cores; OMP_NUM_THREADS, where you set it, wins.

examples:
  interlace launch torchrun quickstart --nproc 2
  interlace launch torchrun quickstart train.steps=50 --nproc 2 --max-restarts 0
  interlace launch torchrun --resume runs/quickstart-0001 --nproc 2
  interlace launch torchrun gpt_1b_offload run.dir=/shared/runs/one --nnodes 2 --rdzv node1:29400

The last line is typed on both machines; the run folder must be the same for both.
"""

SLURM_EXAMPLES = """\
One task per node; each is `interlace launch torchrun`, or with --ray a node of a private Ray
cluster. Before the time limit, or when it is preempted, the job saves and goes back to the queue
until the run is finished; it does not where a new start cannot help.

examples:
  interlace launch slurm gpt_1b_offload --nodes 4 --gpus-per-node 8 --time 24:00:00 --dry-run
  interlace launch slurm gpt_1b_offload --nodes 4 --partition gpu --account mine train.steps=5000
  interlace launch slurm gpt_1b_offload --nodes 4 --ray
  interlace launch slurm --resume runs/gpt_1b_offload-0001 --nodes 2
"""

KUBERNETES_EXAMPLES = """\
A RayJob of KubeRay: a head and a worker per node, which admit nobody without the cluster's token.
The run folder lies on a volume that all of them mount, so that a new start continues the run.

examples:
  interlace launch kubernetes gpt_1b_offload --nodes 4 --image REPOSITORY/IMAGE:TAG --dry-run
  interlace launch kubernetes mine.toml --nodes 2 --image REPOSITORY/IMAGE:TAG --volume claim
"""

SKYPILOT_EXAMPLES = """\
A managed job of SkyPilot: `interlace launch torchrun` on every node. The run folder lies on a
volume that outlives the machines, so that the job that replaces a preempted one continues the run.

examples:
  interlace launch skypilot gpt_1b_offload --nodes 2 --image REPOSITORY/IMAGE:TAG --dry-run
  interlace launch skypilot mine.toml --accelerators A100:8 --image REPOSITORY/IMAGE:TAG
"""


def add_launch(commands: AddParser) -> None:
    """Add the `launch` command and its ways."""
    launch = described(commands, "launch", SUMMARY, EXAMPLES)
    places: AddParser = launch.add_subparsers(
        dest="launcher", metavar="LAUNCHER", required=True
    ).add_parser
    add_torchrun(places)
    add_ray(places)
    add_slurm(places)
    add_kubernetes(places)
    add_skypilot(places)


def add_torchrun(places: AddParser) -> None:
    """Add `launch torchrun`."""
    summary = "several ranks on this machine, or this machine's part of several"
    torchrun = described(places, "torchrun", summary, TORCHRUN_EXAMPLES)
    add_run_words(torchrun)
    torchrun.add_argument(
        "--nproc", metavar="N|gpu|auto", default="auto", help="ranks of this machine"
    )
    torchrun.add_argument(
        "--nnodes", type=int, default=1, metavar="M", help="machines of the run (default 1)"
    )
    torchrun.add_argument(
        "--rdzv",
        metavar="HOST:PORT",
        help="where the machines meet: a free port of one of them, the same words on all",
    )
    torchrun.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="this machine's number, 0 for the one named by --rdzv, so that ranks are the same at "
        "every start (default: in order of arrival)",
    )
    torchrun.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="K",
        help="new starts in a row that bring no new checkpoint (default 3)",
    )


def add_slurm(places: AddParser) -> None:
    """Add `launch slurm`."""
    summary = "a Slurm job that goes back to the queue until the run is finished"
    slurm = described(places, "slurm", summary, SLURM_EXAMPLES)
    add_run_words(slurm)
    add_nodes(slurm)
    add_gpus_of_each(slurm)
    slurm.add_argument(
        "--time", default="24:00:00", metavar="[D-]H:M:S", help="time limit (default 24:00:00)"
    )
    slurm.add_argument(
        "--notice",
        type=int,
        default=120,
        metavar="SECONDS",
        help="time to save in before the limit (default 120)",
    )
    slurm.add_argument("--partition", metavar="NAME", help="partition to queue in")
    slurm.add_argument("--account", metavar="NAME", help="account to charge")
    slurm.add_argument("--ray", action="store_true", help="start the ranks under Ray")
    add_dry_run(slurm, "sbatch")


def add_kubernetes(places: AddParser) -> None:
    """Add `launch kubernetes`."""
    summary = "a RayJob for a Kubernetes cluster with KubeRay"
    kubernetes = described(places, "kubernetes", summary, KUBERNETES_EXAMPLES)
    add_run_words(kubernetes, resumes=False)
    add_nodes(kubernetes)
    add_gpus_of_each(kubernetes)
    add_image_and_volume(kubernetes)
    kubernetes.add_argument("--namespace", metavar="NAME", help="namespace of the job")
    add_dry_run(kubernetes, "kubectl")


def add_skypilot(places: AddParser) -> None:
    """Add `launch skypilot`."""
    summary = "a managed job of SkyPilot, on whichever cloud has room"
    skypilot = described(places, "skypilot", summary, SKYPILOT_EXAMPLES)
    add_run_words(skypilot, resumes=False)
    add_nodes(skypilot)
    skypilot.add_argument(
        "--accelerators", default="H100:8", metavar="NAME:N", help="GPUs of each (default H100:8)"
    )
    add_image_and_volume(skypilot)
    add_dry_run(skypilot, "sky")


def add_nodes(launcher: argparse.ArgumentParser) -> None:
    """Add how many machines a job asks for."""
    launcher.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")


def add_gpus_of_each(launcher: argparse.ArgumentParser) -> None:
    """Add how many GPUs each machine of a job has."""
    launcher.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="G",
        help="GPUs of each (default 8; 0: none)",
    )


def add_image_and_volume(launcher: argparse.ArgumentParser) -> None:
    """Add what a job on machines that come and go needs: our programs, and a place that stays."""
    launcher.add_argument(
        "--image", required=True, metavar="IMAGE", help="image with interlace[ray] in it"
    )
    launcher.add_argument(
        "--volume",
        default="interlace-runs",
        metavar="NAME",
        help="volume that all nodes may write, for the run folder (default interlace-runs)",
    )


def add_dry_run(launcher: argparse.ArgumentParser, program: str) -> None:
    """Add `--dry-run` to a launcher that hands its job to a program."""
    launcher.add_argument(
        "--dry-run", action="store_true", help=f"print the job and do not hand it to {program}"
    )
