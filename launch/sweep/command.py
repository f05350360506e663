"""The command behind `interlace sweep`: what was asked for, checked, run, judged, shown."""

import json
import os
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch

from interlace.launch.sweep.carry import Carried, carry, check_target
from interlace.launch.sweep.conducting import Runner, State, conduct
from interlace.launch.sweep.judging import Judged, judged, winner
from interlace.launch.sweep.page import sweep_page
from interlace.launch.sweep.picture import draw
from interlace.launch.sweep.progress import Progress, estimate, seconds_by_width, trials_to_come
from interlace.launch.sweep.records import write_records
from interlace.launch.sweep.request import Request, read_request
from interlace.launch.sweep.running import usable_cores
from interlace.launch.sweep.store import Store
from interlace.launch.sweep.trials import Trial, make_space, shape_digest
from interlace.trainer.data.prepare import prepare
from interlace.trainer.errors import ConfigError
from interlace.trainer.observe.units import human_duration


def sweep(arguments: Namespace) -> int:
    """Run a sweep and return the exit status: 0 where muP transfers, else 1.

    Raises:
        ConfigError: The request makes no sense; nothing was run.
    """
    request = read_request(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = State(make_space(request, device), Store(request.store))
    if request.transfer_to is not None:
        check_target(state.space, request.transfer_to)
    folder = output_folder(request)
    state.look_up()
    if request.dry_run:
        print(dry_page(state))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_all(state)
    except KeyboardInterrupt:
        print(
            f"\ninterlace: interrupted; finished trials ({len(state.results)}) are kept in "
            f"{request.store}, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return conclude(state, folder)


def output_folder(request: Request) -> Path:
    """Return the folder of a sweep's table, picture and verdict.

    Raises:
        ConfigError: It is a file.
    """
    folder = request.output or Path("runs") / f"sweep-{Path(request.recipe).stem}"
    for option, path in (("--output", folder), ("--store", request.store)):
        if path.exists() and not path.is_dir():
            raise ConfigError([f"{option} {path}: is a file; give a folder"])
    return folder


def run_all(state: State) -> None:
    """Run whatever the store does not have."""
    request = state.space.request
    jobs = request.jobs or (torch.cuda.device_count() or usable_cores())
    with Progress(jobs) as progress:
        progress.found(state)
        if not state.needed():
            return
        # Once, before several workers want it at the same time.
        for config in state.space.configs.values():
            prepare(config.data, announce=lambda text: print(text, file=sys.stderr, flush=True))
        runner = runner_of(state, jobs)
        try:
            conduct(state, runner, progress.show)
        finally:
            runner.close()


def runner_of(state: State, jobs: int) -> Runner:
    """Return whoever runs the trials of a sweep."""
    threads = threads_of_each(jobs)
    if state.space.request.on == "ray":
        from interlace.launch.sweep.ray_tune import RayRunner

        return RayRunner(state.store, jobs, threads, gpus=int(torch.cuda.is_available()))
    from interlace.launch.sweep.workers import LocalRunner

    return LocalRunner(state.store, state.space.code, jobs, threads, torch.cuda.device_count())


def threads_of_each(jobs: int) -> int:
    """Return the threads of a trial: its share of the cores, fewer if OMP_NUM_THREADS says so."""
    share, said = max(1, usable_cores() // jobs), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(said)) if said.isdecimal() and int(said) else share


def conclude(state: State, folder: Path) -> int:
    """Write and show what was found."""
    request = state.space.request
    verdicts = judged(state)
    document = write_records(state, verdicts, folder)
    picture = folder / "sweep.png"
    draw(verdicts, f"{request.recipe}: loss over learning rate", picture)
    best = winner(verdicts)
    carried = (
        carry(state.space, best, request.transfer_to, folder)
        if request.transfer_to and best
        else None
    )
    status = 0 if all(each.passes for each in verdicts if counts(each)) else 1
    if request.as_json:
        document |= {"carried": carried.document() if carried else None}
        print(json.dumps(document, indent=2))
        return status
    print(sweep_page(state, verdicts))
    if request.transfer_to:
        print(f"\n{transfer_page(request.transfer_to, carried)}")
    print(
        f"\npicture  {picture}\ntable    {folder / 'sweep.csv'}\nverdict  {folder / 'sweep.json'}"
    )
    print(f"trials   tensorboard --logdir {folder / 'tensorboard'}")
    return status


def counts(each: Judged) -> bool:
    """Whether a family decides the exit status: muP does, the control does not."""
    return each.family.parametrisation == "mup"


def transfer_page(target: str, carried: Carried | None) -> str:
    """Say what was written for the target, or why nothing was."""
    if carried is None:
        return (
            f"nothing is written for {target}: an optimum is not known at every width, and one at "
            "an edge would mislead"
        )
    return carried.page()


def dry_page(state: State) -> str:
    """List the trials of a sweep as far as they are known, with the time they would take."""
    request, known = state.space.request, recorded_seconds(state)
    wanted = state.needed()
    lines = [*state.space.notes]
    lines.append(f"{len(state.results)} trials are in the store, {len(wanted)} are needed next:")
    for width, count in sorted(Counter(trial.width for trial in wanted).items()):
        rates = sorted({trial.lr for trial in wanted if trial.width == width})
        lines.append(
            f"  width {width}: {count} trials, {len(rates)} learning rates from {rates[0]:g} to "
            f"{rates[-1]:g}"
        )
    to_come = trials_to_come(state)
    later = {w: n for w, n in to_come.items() if n and w not in {trial.width for trial in wanted}}
    if later:
        expected = ", ".join(f"{count} at width {width}" for width, count in later.items())
        lines.append(f"then, around the optimum of the narrower width, about {expected}")
    jobs = request.jobs or (torch.cuda.device_count() or usable_cores())
    if known:
        work = sum(n * (estimate(width, known) or 0.0) for width, n in to_come.items())
        lines.append(f"about {human_duration(work / jobs)} with {jobs} trials at a time")
    elif wanted:
        lines.append("how long they take is not known: the store has no trial of this shape")
    return "\n".join(lines)


def recorded_seconds(state: State) -> dict[int, float]:
    """Return seconds of a trial by width: of this sweep's, or of others of the same shape."""
    known = seconds_by_width(state)
    if known:
        return known
    request, space = state.space.request, state.space
    settings, parametrisation = request.grid[0], request.parametrisations[0]
    shapes: dict[str, int] = {}
    for width in request.widths:
        trial = Trial(width, parametrisation, settings, space.seeds[0], request.ladder.grid[0])
        shapes[shape_digest(space.config_of(trial))] = width
    found: dict[int, list[float]] = {}
    for result in state.store.results():
        if result.shape in shapes and not result.diverged:
            found.setdefault(shapes[result.shape], []).append(result.wall_seconds)
    return {width: sum(seconds) / len(seconds) for width, seconds in found.items()}
