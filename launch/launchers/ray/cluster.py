"""A Ray of our own on this machine, or one that is there already.

One of our own is closed to everybody else: a token that only this user can read, addresses of the
loopback interface, no dashboard, and a temporary folder of mode 0700 around Ray's own, which Ray
makes 0777. It ends with the context, and so do its files.
"""

import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import interlace
from interlace.launch.launchers.ray.request import CPU_WORKERS, Request, Workers
from interlace.launch.launchers.ray.stranger import CLIENT
from interlace.launch.launchers.torchrun import threads_of_each
from interlace.launch.ray_extra import require_ray
from interlace.trainer.errors import ConfigError

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of our own Ray; only the package and a few numbers go through it."""

SETTINGS: Mapping[str, str] = {
    # Errors of ranks and reports of commits are noticed by polling.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker of a machine that hangs is given up after so long.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Machines that died a moment ago are still counted; after so long without room it counts again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Ranks print through the bridge, and find their folder themselves.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of Ray in the launching process, where the user has set nothing else."""

OWN_SETTINGS: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    # Ray takes a loopback address for this machine's own, but where it cannot form clusters (by
    # default on other systems than Linux): there everything listens at 127.0.0.1 only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Environment of a Ray of our own, whatever the user has set."""


@dataclass(frozen=True)
class Cluster:
    """A Ray that this process is connected to.

    Attributes:
        own: Whether it ends with this process.
        scratch: A folder for records of Ray Train; nothing is read from it.
        workers: How many ranks a run may have.
        cpus_per_worker: Cores that each reserves.
        gpus: GPUs of the cluster.
        output: The standard output, where nothing that Ray prints by itself appears.
    """

    own: bool
    scratch: Path
    workers: Workers
    cpus_per_worker: int
    gpus: int
    output: TextIO


@contextmanager
def connected(request: Request) -> Generator[Cluster]:
    """Start a Ray of our own or join one; leave it, or end it, with the context."""
    require_ray("launch ray", "use  interlace launch torchrun")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = Path(tempfile.mkdtemp(prefix="interlace-ray-"))
    sweeper = start_sweeper(folder)
    try:
        opened = start_own(request, folder) if request.address == "local" else join(request, folder)
        try:
            # A paragraph for every rank that dies.
            with (folder / "ray.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
                yield opened
                close()
        finally:
            close()
    finally:
        sweeper.communicate()


def start_sweeper(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that cleans up after this one, however it ends."""
    paths = [str(package_folder().parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        # Nothing of site-packages is needed.
        [sys.executable, "-S", "-m", "interlace.launch.launchers.ray.sweeper", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def close() -> None:
    """Leave Ray, or end it if it is our own; may be called twice."""
    import ray

    ray.shutdown()


def start_own(request: Request, folder: Path) -> Cluster:
    """Start a Ray on this machine that nobody else can use."""
    token = folder / "token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    os.environ |= {**OWN_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token)}
    # It would win over the file.
    os.environ.pop("RAY_AUTH_TOKEN", None)
    import ray
    import torch

    gpus = torch.cuda.device_count()
    workers = request.workers or Workers(gpus or CPU_WORKERS, gpus or CPU_WORKERS)
    cpus = request.cpus_per_worker or threads_of_each(workers.most)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, cpus * workers.most),
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": local_environment(cpus)},
        _temp_dir=str(folder / "ray"),
    )
    return Cluster(True, folder, workers, cpus, gpus, sys.stdout)


def join(request: Request, folder: Path) -> Cluster:
    """Connect to a cluster that is there already.

    Raises:
        ConfigError: There is none, or it admits anybody.
    """
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(
            address=request.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=shipped(),
        )
    except (ConnectionError, RayError) as error:
        raise ConfigError(
            [
                f"--address {request.address}: {error}\nStart one with  ray start --head  or leave "
                "--address out for one of its own"
            ]
        ) from error
    if not request.allow_open_cluster:
        client = request.address.startswith(CLIENT)
        control = request.address if client else ray.get_runtime_context().gcs_address
        require_token(request.address, control)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = request.workers or Workers(gpus or CPU_WORKERS, gpus or CPU_WORKERS)
    return Cluster(False, folder, workers, request.cpus_per_worker or 1, gpus, sys.stdout)


def require_token(address: str, control: str) -> None:
    """See that a cluster admits nobody without its token.

    Args:
        address: As it was typed.
        control: Where its control store listens, or its server for clients, `ray://HOST:PORT`.

    Raises:
        ConfigError: It does.
    """
    environment = {name: value for name, value in os.environ.items() if "RAY_AUTH" not in name}
    command = [sys.executable, "-m", "interlace.launch.launchers.ray.stranger", control]
    probe = subprocess.run(
        command,
        env={**environment, "RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"},
        capture_output=True,
        check=False,
    )
    if probe.returncode == 0:
        raise ConfigError(
            [
                f"--address {address}: this cluster admits anybody who can reach it, and whoever "
                "does can run programs as you. Start every node with RAY_AUTH_MODE=token and the "
                "same RAY_AUTH_TOKEN_PATH (ray get-auth-token --generate makes a token), or type "
                "--allow-open-cluster if its network is closed"
            ]
        )


def package_folder() -> Path:
    """Return the folder of the package `interlace`."""
    return Path(interlace.__file__).parent


def local_environment(threads: int) -> dict[str, str]:
    """Return the environment of ranks on this machine: they import what this process imports, and
    speak to each other over the loopback interface, as all of our own Ray.
    """
    paths = [str(package_folder().parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def shipped() -> dict[str, Any]:
    """Return a runtime environment that takes this package to other machines, and the settings that
    are meant for ranks; nothing else of this process's environment, which may hold secrets.
    """
    passed = ("INTERLACE_", "GLOO_", "NCCL_", "OMP_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name.startswith(passed)}
    return {
        "py_modules": [str(package_folder())],
        "excludes": ["__pycache__"],
        "env_vars": variables,
    }
