"""What all ranks make sure of before the first of them creates anything.

Ranks are started by hand or by launchers on many machines, and one that was given another recipe,
or has another version of the program installed, would compute something else in step with the
others, or hang them. So each tells the others what it was given and what it runs; where they
differ, all of them stop with the same message. It names values, and ranks by number.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.problems import show
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.plan import check_ranks
from interlace.trainer.run_folder import flatten
from interlace.trainer.source_digest import source_digest
from interlace.trainer.world import World

OURS = ("the sources of interlace", "torch", "python")
PROGRAM = (*OURS, "deepspeed")


def agree(config: RunConfig, world: World) -> None:
    """Return if the recipe fits so many ranks, and every rank has it and runs the same program,
    which has the engine that the recipe asks for.

    Raises:
        ConfigError: It does not, or they differ; the same on every rank.
    """
    check_ranks(config, config.train.tokens_per_step // config.data.sequence_length, world.size)
    if world.size > 1:
        known = world.gather(told_by(config))
        if problems := differences(known):
            raise ConfigError(problems)
    if uses_zero(config):
        from interlace.trainer.engines.zero.installed import require_deepspeed

        require_deepspeed()


def told_by(config: RunConfig) -> dict[str, str]:
    """Return what a rank tells: settings by name, files of plug-ins and parts of the program."""
    told = {key: show(value) for key, value in flatten(config).items()}
    for file in (*config.model.plugins, config.parallel.deepspeed_config):
        if file:
            told[f"the contents of {file}"] = digest_of(Path(file).expanduser())
    if uses_zero(config):
        from interlace.trainer.engines.zero.installed import deepspeed_version

        told["deepspeed"] = deepspeed_version() or "absent"
    versions = (source_digest()[:12], torch.__version__, platform.python_version())
    return told | dict(zip(OURS, versions, strict=True))


def digest_of(file: Path) -> str:
    """Return a short digest of what a file holds; that it is there is for others to check."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        return "absent"


def differences(known: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one sentence for each thing that is not the same on all ranks."""
    keys = list(dict.fromkeys(key for told in known for key in told))
    return [
        sentence(key, values)
        for key in keys
        if len(set(values := [told.get(key, "absent") for told in known])) > 1
    ]


def sentence(key: str, values: Sequence[str]) -> str:
    """Say which ranks have which value, and what to do."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    listed = ", ".join(f"{value} on {named(numbers)}" for value, numbers in ranks.items())
    remedy = "install one version everywhere" if key in PROGRAM else "start all with one recipe"
    verb = "are" if key == PROGRAM[0] else "is"
    return f"{key} {verb} not the same on all ranks: {listed}; {remedy}"


def named(ranks: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0, 1, 2 and 5 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"ranks {', '.join(map(str, ranks[:3]))}{more}"
