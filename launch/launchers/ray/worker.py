"""What every rank does under Ray Train: open its world, train, and say how it ended.

Ray Train calls `run_rank` in a thread of a process of its own, in which the process group exists
already. Signals reach neither this thread nor a process of another machine, so a second thread asks
the bridge once a second whether to stop. An end that a new start may cure is raised, and Ray Train
starts the ranks again; any other is told to the launching process, which ends the run.
"""

import os
import secrets
import socket
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.launch.launchers.ray.bridge import Ending, answer
from interlace.launch.launchers.ray.console import forwarding
from interlace.launch.launchers.ray.listening import Listener, leave_with_parent
from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.ends import LAUNCHER_VARIABLE
from interlace.trainer.errors import ConfigError, UserError
from interlace.trainer.exits import RESTARTABLE, Exit, status_of
from interlace.trainer.starts import RESTART_VARIABLE
from interlace.trainer.world import World

VISIBLE_SECONDS = 10.0
"""How long a new file may take to be seen by other machines of a shared storage."""


@dataclass(frozen=True)
class Errand:
    """What a rank is told to do.

    Attributes:
        tables: The recipe, as its tables, with an absolute run folder.
        folder: What other relative paths in it are relative to.
        bridge: Handle of the bridge.
    """

    tables: Mapping[str, Any]
    folder: str
    bridge: Any

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.tables["run"]["dir"])


def run_rank(errand: Errand) -> str:
    """Train as one rank of several.

    Returns:
        How it ended, for Ray's own records.

    Raises:
        Exception: Whatever a new start may cure.
    """
    leave_with_parent()
    # As the command line does; a raylet that somebody else started has his own.
    os.umask(0o077)
    if Path(errand.folder).is_dir():
        os.chdir(errand.folder)
    world, bridge = world_of_ray(), errand.bridge
    generation = world.broadcast(answer(bridge.begin.remote()) if world.is_main else 0)
    os.environ[LAUNCHER_VARIABLE] = "ray"
    os.environ[RESTART_VARIABLE] = str(generation - 1)
    with Listener(bridge, generation, world, errand.run_dir) as listener:
        ended = train_as(listener, errand)
    answer(bridge.end.remote(ended))
    return ended.message or f"status {ended.status}"


def world_of_ray() -> World:
    """Return this process's place among the ranks that Ray Train has started; torchrun's variables
    say the same.
    """
    import torch
    from ray import train

    context = train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return World(context.get_world_rank(), context.get_world_size(), device)


def train_as(listener: Listener, errand: Errand) -> Ending:
    """Train; return how it ended, or raise what a new start may cure."""
    from interlace.trainer.loop import train

    generation, world = listener.generation, listener.world
    try:
        with console_of(listener):
            config = config_of(errand)
            require_shared(world, errand.run_dir)
            outcome = train(config, world, stop=listener.stop, on_commit=report_commit)
    except UserError as error:
        status = status_of(error)
        if status in RESTARTABLE:
            raise
        return Ending(generation, world.rank, status, message=str(error))
    moving = listener.moving and not outcome.finished
    return Ending(generation, world.rank, Exit.DONE, outcome.finished, moving)


def config_of(errand: Errand) -> RunConfig:
    """Return the recipe; plug-ins are loaded in this process too."""
    return validate(dict(errand.tables))


@contextmanager
def console_of(listener: Listener) -> Generator[None]:
    """Let what rank 0 prints appear in the launching terminal."""
    if not listener.world.is_main:
        yield
        return
    with forwarding(listener.say):
        yield


def report_commit(step: int) -> None:
    """Tell Ray Train of a committed checkpoint, so that its own records show the progress; what
    a run resumes from is read from the run folder alone.
    """
    from ray import train

    train.report({"committed_step": step})


def require_shared(world: World, run_dir: Path) -> None:
    """See that ranks on several machines mean the same folder by its name.

    Raises:
        ConfigError: A file that rank 0 writes beside the run folder is not there for all.
    """
    hosts = world.gather(socket.gethostname())
    if len(set(hosts)) == 1:
        return
    marker = world.broadcast(run_dir.parent / f".interlace-{secrets.token_hex(8)}")
    if world.is_main:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch(exist_ok=False)
    world.barrier()
    seen = world.gather(appears(marker))
    if world.is_main:
        marker.unlink()
    blind = sorted({host for host, sees in zip(hosts, seen, strict=True) if not sees})
    if blind:
        raise ConfigError(
            [
                f"run.dir={run_dir}: {', '.join(blind)} does not see what {hosts[0]} writes there; "
                "checkpoints need a folder that all machines share, so type run.dir=PATH with one"
            ]
        )


def appears(path: Path) -> bool:
    """Whether a file is there, or comes within the time that network storage may take."""
    end = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < end:
        # Listing the folder makes a client of NFS look again.
        if path.parent.is_dir() and path in path.parent.iterdir():
            return True
        time.sleep(0.2)
    return False
