"""`interlace launch slurm`, `kubernetes` and `skypilot`: a job as text, and the program that takes
it.

The text is all there is to a job: the recipe is in it, or lies where the job runs, the run folder
is fixed, and the commands in it are those one would type. `--dry-run` prints it.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interlace.launch.launchers.request import fixed_run, positive, refuse
from interlace.launch.launchers.templates import (
    filled,
    in_block,
    in_shell,
    in_yaml,
    job_name,
    misspelled,
)
from interlace.trainer.config.load import Recipe
from interlace.trainer.errors import ConfigError, UserError
from interlace.trainer.run_folder import config_text

VOLUME_FOLDER = "/runs"
"""Where jobs on machines that come and go mount the volume that stays."""


@dataclass(frozen=True)
class Scheduler:
    """Who takes a job.

    Attributes:
        program: What it is handed to, and the words before the file.
        file: Name of the file.
        render: Makes the text.
    """

    program: tuple[str, ...]
    file: str
    render: Callable[[Namespace, Recipe], "Job"]


@dataclass(frozen=True)
class Job:
    """A job as text.

    Attributes:
        text: What the scheduler reads.
        folder: Run folder that was made for it on this machine, where one was.
    """

    text: str
    folder: Path | None = None


def launch_job(arguments: Namespace, recipe: Recipe) -> int:
    """Print a job, or hand it over; return the exit status."""
    scheduler = SCHEDULERS[arguments.launcher]
    if arguments.dry_run:
        print(scheduler.render(arguments, recipe).text, end="")
        return 0
    program = scheduler.program[0]
    if shutil.which(program) is None:
        raise ConfigError(
            [
                f"{program} is not on this machine, and the job is for it; type --dry-run to see "
                "the job, and run this where it is"
            ]
        )
    submit(scheduler, scheduler.render(arguments, recipe))
    return 0


def submit(scheduler: Scheduler, job: Job) -> None:
    """Hand a job over in a file that only we can read and that is gone afterwards.

    Raises:
        UserError: It was not taken.
    """
    with tempfile.TemporaryDirectory(prefix="interlace-job-") as folder:
        path = Path(folder) / scheduler.file
        path.write_text(job.text, encoding="utf-8")
        done = subprocess.run([*scheduler.program, str(path)], check=False)
    if done.returncode != 0:
        if job.folder is not None and not any(job.folder.iterdir()):
            job.folder.rmdir()
        raise UserError(
            f"{scheduler.program[0]} did not take the job (status {done.returncode}); what it said "
            "is above, and --dry-run shows the job"
        )


def slurm(arguments: Namespace, recipe: Recipe) -> Job:
    """Return the sbatch script of a run."""
    problems = [
        *positive("--nodes", arguments.nodes),
        *positive("--notice", arguments.notice),
        *misspelled("--time", arguments.time, "time"),
        *misspelled("--partition", arguments.partition, "name"),
        *misspelled("--account", arguments.account, "name"),
    ]
    if arguments.gpus_per_node < 0:
        problems.append(f"--gpus-per-node {arguments.gpus_per_node}: must be 0 or more")
    run = fixed_run(arguments, recipe, claim=False)
    refuse([*problems, *misspelled("run.dir", str(run.folder), "path")])
    claims = not arguments.dry_run and not recipe.config.run.dir
    if claims:
        run = fixed_run(arguments, recipe)
    elif not arguments.dry_run:
        # The log lies there from the start, and without it Slurm ends the job without a word.
        run.folder.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "--gpus-per-node": arguments.gpus_per_node or None,
        "--partition": arguments.partition,
        "--account": arguments.account,
    }
    given = [f"#SBATCH {key}={value}\n" for key, value in options.items() if value is not None]
    ranks = max(1, arguments.gpus_per_node)
    job_options = ["--run", str(run.folder), "--ranks-per-node", str(ranks)]
    text = filled(
        "slurm.sh",
        {
            "RUN_NAME": run.name,
            "NODES": str(arguments.nodes),
            "TIME": arguments.time,
            "NOTICE": str(arguments.notice),
            "LOG": f"{run.folder}-slurm-%j.log",
            "OPTIONS": "".join(given),
            "WORK_FOLDER": in_shell(str(Path.cwd())),
            "PYTHON": in_shell(sys.executable),
            "JOB_OPTIONS": in_shell(*job_options, *(["--ray"] if arguments.ray else [])),
            "WORDS": in_shell(*run.words),
        },
    )
    return Job(text, run.folder if claims else None)


def kubernetes(arguments: Namespace, recipe: Recipe) -> Job:
    """Return the RayJob of a run."""
    namespace = arguments.namespace or "default"
    problems = [
        *positive("--nodes", arguments.nodes),
        *misspelled("--namespace", namespace, "label"),
        *misspelled("--image", arguments.image, "image"),
        *misspelled("--volume", arguments.volume, "label"),
    ]
    if arguments.gpus_per_node < 0:
        problems.append(f"--gpus-per-node {arguments.gpus_per_node}: must be 0 or more")
    refuse(problems)
    gpus, nodes = arguments.gpus_per_node, arguments.nodes
    # Eight cores and a tenth of a terabyte for each GPU is what nodes that carry them have; both
    # are there to be edited.
    resources = {"cpu": str(8 * max(1, gpus)), "memory": f"{96 * max(1, gpus)}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    workers = ["--address", "auto", "--workers", str(nodes * max(1, gpus))]
    command = ["interlace", "launch", "ray", "/recipe/recipe.toml", *far_overrides(recipe)]
    text = filled(
        "kuberay.yaml",
        {
            "RUN_NAME": recipe.config.run.name,
            "JOB_NAME": job_name(recipe.config.run.name),
            "NAMESPACE": in_yaml(namespace),
            "NODES": str(nodes),
            "RECIPE": in_block(config_text(recipe.config), 4),
            "ENTRYPOINT": in_yaml(in_shell(*command, *workers)),
            "IMAGE": in_yaml(arguments.image),
            "VOLUME": in_yaml(arguments.volume),
            "RESOURCES": json.dumps(resources),
        },
    )
    return Job(text)


def skypilot(arguments: Namespace, recipe: Recipe) -> Job:
    """Return the SkyPilot task of a run."""
    refuse(
        [
            *positive("--nodes", arguments.nodes),
            *misspelled("--accelerators", arguments.accelerators, "accelerators"),
            *misspelled("--image", arguments.image, "image"),
            *misspelled("--volume", arguments.volume, "label"),
        ]
    )
    text = filled(
        "skypilot.yaml",
        {
            "RUN_NAME": recipe.config.run.name,
            "JOB_NAME": in_yaml(job_name(recipe.config.run.name)),
            "NODES": str(arguments.nodes),
            "ACCELERATORS": in_yaml(arguments.accelerators),
            "IMAGE": in_yaml(f"docker:{arguments.image}"),
            "VOLUME": in_yaml(arguments.volume),
            "RECIPE": in_block(config_text(recipe.config), 2),
            "OVERRIDES": in_shell(*far_overrides(recipe)),
        },
    )
    return Job(text)


def far_overrides(recipe: Recipe) -> list[str]:
    """Return what of a recipe is otherwise on machines that come and go: its folders."""
    run, data = recipe.config.run, recipe.config.data
    overrides: list[str] = []
    if not run.dir.startswith(f"{VOLUME_FOLDER}/"):
        folder = re.sub(r"[^A-Za-z0-9._-]", "-", Path(run.dir).name) or run.name
        overrides.append(f"run.dir={VOLUME_FOLDER}/{folder}")
    if not Path(data.prepared_dir).is_absolute():
        overrides.append(f"data.prepared_dir={VOLUME_FOLDER}/prepared")
    return overrides


SCHEDULERS = {
    "slurm": Scheduler(("sbatch",), "job.sh", slurm),
    "kubernetes": Scheduler(("kubectl", "create", "-f"), "job.yaml", kubernetes),
    "skypilot": Scheduler(("sky", "jobs", "launch", "--yes"), "task.yaml", skypilot),
}
