"""What the words of `launch ray` ask for, checked before Ray is loaded."""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError

CPU_WORKERS = 2
"""Ranks where nothing is said and there is no GPU."""


@dataclass(frozen=True)
class Workers:
    """How many ranks a run may have.

    Attributes:
        least: With fewer it waits for machines.
        most: It never has more.
    """

    least: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.least < self.most


@dataclass(frozen=True)
class Request:
    """What a launch shall do.

    Attributes:
        config: The recipe.
        workers: How many ranks; None if it depends on the cluster.
        address: "local" for a Ray of our own, else the one to join.
        max_failures: How often to start again; -1 for always.
        cpus_per_worker: Cores that each rank reserves; None if it depends on the cluster.
        placement: Ray's placement strategy.
        resize_seconds: How often an elastic run looks for room for more ranks.
        allow_open_cluster: Whether a cluster without a token is joined.
        folder: What relative paths of the recipe are relative to.
    """

    config: RunConfig
    workers: Workers | None
    address: str
    max_failures: int
    cpus_per_worker: int | None
    placement: str
    resize_seconds: float
    allow_open_cluster: bool
    folder: Path


def request_of(arguments: Namespace, config: RunConfig) -> Request:
    """Check the words against the recipe.

    Raises:
        ConfigError: All that is wrong with them.
    """
    workers = parse_workers(arguments.workers) if arguments.workers is not None else None
    problems = [
        *(uneven_counts(config, workers) if workers else []),
        *misnumbered(arguments),
        *unknown_address(arguments.address),
    ]
    if problems:
        raise ConfigError(problems)
    return Request(
        config=config,
        workers=workers,
        address=arguments.address,
        max_failures=arguments.max_failures,
        cpus_per_worker=arguments.cpus_per_worker,
        placement=arguments.placement.upper().replace("-", "_"),
        resize_seconds=arguments.resize_seconds,
        allow_open_cluster=arguments.allow_open_cluster,
        folder=Path.cwd(),
    )


def parse_workers(text: str) -> Workers:
    """Read `N` or `MIN:MAX`.

    Raises:
        ConfigError: It is neither.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?::([1-9][0-9]{0,5}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise ConfigError(
            [
                f"--workers {text}: is neither a number of ranks nor a range of such; type "
                f"--workers {CPU_WORKERS}  or  --workers 1:{CPU_WORKERS}"
            ]
        )
    return Workers(least, most)


def even_counts(config: RunConfig, workers: Workers) -> Sequence[int]:
    """Return the numbers of ranks, ascending, over which the rows of a step can be spread."""
    rows = config.train.tokens_per_step // config.data.sequence_length
    return [
        count
        for count in range(workers.least, workers.most + 1)
        if rows % count == 0 and count % config.parallel.replicas == 0
    ]


def uneven_counts(config: RunConfig, workers: Workers) -> Sequence[str]:
    """Return what is wrong with a number of ranks that no step can be spread over."""
    if even_counts(config, workers):
        return []
    rows = config.train.tokens_per_step // config.data.sequence_length
    asked = str(workers.most) if not workers.elastic else f"{workers.least}:{workers.most}"
    fitting = even_counts(config, Workers(1, rows))
    near = min(fitting, key=lambda count: abs(count - workers.most), default=None)
    remedy = f"type --workers {near}" if near else "change train.tokens_per_step"
    return [
        f"--workers {asked}: a step has {rows} rows in {config.parallel.replicas} replicas, which "
        f"no such number of ranks divides evenly; {remedy}"
    ]


def misnumbered(arguments: Namespace) -> Sequence[str]:
    """Return what is wrong with other numbers."""
    failures, cores = arguments.max_failures, arguments.cpus_per_worker
    problems: list[str] = []
    if failures < -1:
        problems.append(
            f"--max-failures {failures}: is no number of failures; type --max-failures -1 to start "
            "again always, 0 for never"
        )
    if cores is not None and cores < 1:
        problems.append(f"--cpus-per-worker {cores}: a rank needs one; type --cpus-per-worker 1")
    if arguments.resize_seconds <= 0:
        problems.append(
            f"--resize-seconds {arguments.resize_seconds:g}: must be more than 0; type "
            "--resize-seconds 60"
        )
    return problems


def unknown_address(address: str) -> Sequence[str]:
    """Return what is wrong with an address."""
    if re.fullmatch(r"local|auto|(ray://)?[A-Za-z0-9_.\[\]:-]+:[0-9]{1,5}", address):
        return []
    return [
        f"--address {address}: is no Ray cluster; type --address local, --address auto, or where "
        "its head node listens, as in --address 10.0.0.1:6379"
    ]
