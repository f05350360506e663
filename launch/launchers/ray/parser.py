"""The words of `interlace launch ray`; nothing heavy is loaded to explain them."""

from interlace.launch.launchers.words import AddParser, add_run_words, described

MAX_FAILURES = 3
"""How often a run is started again by default; ends that only announce a node's going do not count.
"""

SUMMARY = "train as a job of Ray Train, on this machine or on a cluster"
EXAMPLES = """\
Without --address a Ray of its own is started on this machine, reachable from nowhere else, and
ended with the run. A rank that dies is no end: the run goes on from its newest checkpoint.

examples:
  interlace launch ray quickstart                             two CPU workers, or every GPU
  interlace launch ray quickstart --workers 4 run.dir=/scratch/mine
  interlace launch ray quickstart --workers 2:8 --address auto run.dir=/shared/mine
  interlace launch ray --resume runs/quickstart-0001 --workers 4
"""


def add_ray(launchers: AddParser) -> None:
    """Add `ray` to the launchers."""
    ray = described(launchers, "ray", SUMMARY, EXAMPLES)
    add_run_words(ray)
    ray.add_argument(
        "--workers",
        metavar="N|MIN:MAX",
        help="ranks; with a range as many as there is room for, more or fewer as machines come and "
        "go (default every GPU, or 2 on CPUs)",
    )
    ray.add_argument(
        "--address",
        default="local",
        metavar="local|auto|HOST:PORT|ray://HOST:PORT",
        help="the Ray cluster: one of its own on this machine (local, the default), the one this "
        "machine belongs to (auto), or by address",
    )
    ray.add_argument(
        "--max-failures",
        type=int,
        default=MAX_FAILURES,
        metavar="K",
        help="how often to start again after a failure; -1 for always, 0 for never (default "
        f"{MAX_FAILURES}); nodes taken away with notice do not count",
    )
    ray.add_argument(
        "--cpus-per-worker",
        type=int,
        metavar="N",
        help="cores that each rank reserves (default its part of this machine, or 1 on a cluster)",
    )
    ray.add_argument(
        "--placement",
        choices=("pack", "spread", "strict-spread"),
        default="pack",
        help="put ranks on few nodes (pack, the default), on many, or on one each (strict-spread)",
    )
    ray.add_argument(
        "--resize-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="how often a run with a range of ranks looks for room for more (default 60)",
    )
    ray.add_argument(
        "--allow-open-cluster",
        action="store_true",
        help="join a cluster that admits anybody without a token",
    )
