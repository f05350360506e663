"""What `interlace launch ray` does: check the words, open a Ray, run the ranks in it."""

from argparse import Namespace

from interlace.launch.launchers.ray.cluster import connected
from interlace.launch.launchers.ray.request import request_of
from interlace.launch.launchers.request import fixed_run
from interlace.trainer.config.load import Recipe


def launch_ray(arguments: Namespace, recipe: Recipe) -> int:
    """Train under Ray Train; return the exit status of the run."""
    request = request_of(arguments, recipe.config)
    run_dir = fixed_run(arguments, recipe).folder
    from interlace.launch.launchers.ray.driving import drive

    with connected(request) as cluster:
        return drive(request, run_dir, cluster)
