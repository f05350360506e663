"""A new run that goes on from a checkpoint of another one, which stays as it is.

This is how a person goes back before a spike or a fault: the branch has a folder of its own, its
`config.toml` says what it is a branch of (`run.branch_of`, `run.branch_step`), and rows or settings
may differ from there on. With the same settings it repeats the other run, in one process as well as
on many ranks: `interlace train --resume RUN --from-step STEP run.dir=NEW train.max_bad_steps=1`
finds a NaN again.
"""

import shutil
from pathlib import Path

from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.files import open_regular, write_file
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.contract import ENVIRONMENT_NAME
from interlace.trainer.data.gaps import Gaps, batch_of, parse_gaps
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.observe.metrics import METRICS_NAME

COPIED_BYTES = 2**24
"""Read and written at a time."""


def copy_checkpoint(source: CheckpointStore, step: int, target: CheckpointStore) -> None:
    """Commit in `target` what `source` committed as `step`; every digest is checked on the way.

    Raises:
        CheckpointError: There is no such step, or it is broken.
        SaveError: It cannot be written.
    """
    steps = source.committed_steps()
    if step not in steps:
        raise CheckpointError(
            f"{source.folder} holds no checkpoint of step {step}; it holds "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    manifest = source.read_manifest(step)
    attempt = target.begin_attempt()
    folder = target.reserve(step, attempt, manifest.total_bytes)
    for record in manifest.files:
        path = source.committed_path(step) / record.name
        with open_regular(path) as file:
            written = write_file(folder / record.name, iter(lambda: file.read(COPIED_BYTES), b""))
        if written != record:
            target.abandon(step, attempt)
            raise CheckpointError(
                f"{path}: is not what its manifest promises, so nothing was copied; take an "
                "older step"
            )
    target.publish(step, attempt, manifest.files, manifest.payload)


def branch(config: RunConfig, saved: RunConfig, path: Path) -> None:
    """Make a new run folder the branch that its recipe asks for; rank 0 only.

    Args:
        config: The recipe of the branch, checked against `saved` but for `data.skip_batches`.
        saved: The recipe of the run that it is a branch of.
        path: The folder of the branch, which holds no checkpoint yet.

    Raises:
        ConfigError: The branch would take other batches than those its checkpoint was trained on.
        CheckpointError: There is no such checkpoint, or it is broken.
    """
    origin, step = Path(config.run.branch_of).expanduser(), config.run.branch_step
    before, now = parse_gaps(saved.data.skip_batches), parse_gaps(config.data.skip_batches)
    check_gaps(config, before, now)
    # What was measured until there, and on what: a branch says how exactly it repeats that.
    for name in (METRICS_NAME, ENVIRONMENT_NAME):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, path / name)
    copy_checkpoint(
        CheckpointStore(origin / "checkpoints"), step, CheckpointStore(path / "checkpoints")
    )


def check_gaps(config: RunConfig, before: Gaps, now: Gaps) -> None:
    """Raise `ConfigError` unless all steps up to the branch take the batches that they took."""
    step = config.run.branch_step
    if all(batch_of(past, before) == batch_of(past, now) for past in range(step)):
        return
    first = batch_of(step - 1, before) + 2
    raise ConfigError(
        [
            f"data.skip_batches={config.data.skip_batches}: the checkpoint of step {step} has been "
            f"trained on batches that this leaves out, or the other way round; keep what the run "
            f"left out and add only batches from {first} on, or branch at an earlier step"
        ]
    )
