"""The run folder: a run that explains itself and can be continued.

`open_run_folder` decides where a run lives and whether it continues, and refuses to continue with a
model or a data order other than the one the checkpoints were made with. The folder holds
`config.toml` (valid as a recipe), `plan.json`, `environment.json`, `tokenizer.json`, metrics,
pictures, samples and `checkpoints/`.
"""

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tomli_w

from interlace.trainer.branching import branch
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.config.checks import validate
from interlace.trainer.config.problems import show
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.toml_files import read_tables
from interlace.trainer.errors import CheckpointError, ConfigError

FIXED_SECTIONS = ("model", "data", "mup")
FIXED_SETTINGS = (
    "run.seed",
    "train.tokens_per_step",
    "train.objective",
    "distill.train_only",
    # These say which weights and rows a checkpoint holds.
    "energy.steps",
    "energy.variant",
    "energy.candidate_table",
    "energy.learn_step_size",
    "energy.replay_rows",
)
FREE_SETTINGS = ("data.workers", "data.prepared_dir")
NOTED_SETTINGS = ("model.attention_backend", "model.plugins")
"""Settings of fixed sections that a continued run may change: kernels agree up to rounding, and
files may have been moved.
"""

PRIVATE = 0o700
"""Mode of a run folder: what is trained on shows in it, in samples and in the tokenizer."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives.

    Attributes:
        path: The folder, absolute.
        resumes: Whether it holds a committed checkpoint to continue from.
        notes: What a person should know about the continuation.
    """

    path: Path
    resumes: bool
    notes: tuple[str, ...]

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.path / "checkpoints")


def open_run_folder(config: RunConfig) -> RunFolder:
    """Choose the run folder and create it; called by rank 0 only.

    Raises:
        ConfigError: The folder belongs to something else, or to a run that this recipe cannot
            continue.
    """
    path = Path(config.run.dir).expanduser() if config.run.dir else next_folder(config.run.name)
    path = path.absolute()
    saved = path / "config.toml"
    require_ours(path)
    # A start that failed early has left the number of its attempt and nothing else.
    begun = saved.is_file() or (path / "checkpoints" / "attempts").is_dir()
    if path.is_dir() and any(path.iterdir()) and not begun:
        raise ConfigError(
            [
                f"run.dir={config.run.dir}: the folder exists, is not empty and holds no run "
                "(no config.toml); type another run.dir"
            ]
        )
    resumes = bool(CheckpointStore(path / "checkpoints").committed_steps())
    notes: tuple[str, ...] = ()
    if resumes:
        notes = continuation_notes(read_config(path, config.model.plugins), config, path)
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
    if config.run.branch_of and not resumes:
        notes, resumes = begin_branch(config, path), True
    return RunFolder(path, resumes, notes)


def begin_attempt(folder: RunFolder, config: RunConfig) -> tuple[RunFolder, int]:
    """Take the number of this start, and see again whether the run continues: another start may
    have saved since the folder was opened, and only the number keeps it from saving more. Called by
    rank 0 only.

    Raises:
        ConfigError: This recipe cannot continue what the other start has begun.
        SaveError: The folder cannot be written.
    """
    attempt = folder.store.begin_attempt()
    if folder.resumes or not folder.store.committed_steps():
        return folder, attempt
    saved = read_config(folder.path, config.model.plugins)
    notes = continuation_notes(saved, config, folder.path)
    return RunFolder(folder.path, True, notes), attempt


def require_ours(path: Path) -> None:
    """Do nothing if a run folder is this user's own, or is not there yet.

    Raises:
        ConfigError: Another user could change, or has made, what the run reads and continues from.
    """
    try:
        facts = path.stat()
    except OSError:
        return
    if hasattr(os, "getuid") and facts.st_uid != os.getuid():
        raise ConfigError(
            [
                f"run.dir={path}: the folder belongs to user {facts.st_uid}, and this is user "
                f"{os.getuid()}: what lies in it could be changed under the run; type another "
                "run.dir"
            ]
        )
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(
            [
                f"run.dir={path}: every user may write there and change what the run continues "
                f"from; type  chmod 700 {path}  or another run.dir"
            ]
        )


def begin_branch(config: RunConfig, path: Path) -> tuple[str, ...]:
    """Fill a new run folder with what the run has that it is a branch of; return notes for a
    person.

    Raises:
        ConfigError: The recipe cannot continue that run.
        CheckpointError: It has no such checkpoint.
    """
    origin = Path(config.run.branch_of).expanduser()
    saved = read_config(origin, config.model.plugins)
    # What may differ of it is for the branch to check.
    data = saved.data.model_copy(update={"skip_batches": config.data.skip_batches})
    notes = continuation_notes(saved.model_copy(update={"data": data}), config, origin)
    # First of all, so that a branch that was interrupted can be begun again.
    write_atomically(path / "config.toml", config_text(config))
    branch(config, saved, path)
    return (f"a branch of {origin} from step {config.run.branch_step} on", *notes)


def next_folder(name: str) -> Path:
    """Return the first `runs/<name>-<number>` that nothing uses."""
    pattern = re.compile(re.escape(name) + r"-([0-9]{4,})")
    runs = Path("runs")
    taken = [int(m[1]) for p in runs.glob(f"{name}-*") if (m := pattern.fullmatch(p.name))]
    return runs / f"{name}-{max(taken, default=0) + 1:04d}"


def claim_next_folder(name: str) -> Path:
    """Make the first `runs/<name>-<number>` that nothing uses, so that nobody else takes it."""
    while True:
        folder = next_folder(name)
        try:
            folder.mkdir(parents=True, mode=PRIVATE)
        except FileExistsError:
            continue
        return folder


def continuation_notes(saved: RunConfig, asked: RunConfig, path: Path) -> tuple[str, ...]:
    """Compare the recipe of a run with the one that shall continue it.

    Raises:
        ConfigError: Model, data or batch differ, so the checkpoints do not fit.
    """
    before, after = flatten(saved), flatten(asked)
    changed = [key for key in after if before.get(key) != after[key]]
    refused = [
        f"{key}={show(after[key])}: the run in {path} was started with {show(before.get(key))}, "
        "and its "
        f"checkpoints do not fit another; type {key}={show(before.get(key))} or another run.dir"
        for key in changed
        if is_fixed(key)
    ]
    if refused:
        raise ConfigError(refused)
    return tuple(
        f"{key} is now {show(after[key])}, was {show(before.get(key))}"
        for key in changed
        if not key.startswith("run.") and key not in FREE_SETTINGS
    )


def is_fixed(key: str) -> bool:
    """Whether a setting belongs to the mathematics that a checkpoint presumes."""
    if key in FREE_SETTINGS or key in NOTED_SETTINGS:
        return False
    return key in FIXED_SETTINGS or key.split(".")[0] in FIXED_SECTIONS


def flatten(config: RunConfig) -> dict[str, object]:
    """Return every setting as `section.key`."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in cast(dict[str, object], values).items()
    }


def config_text(config: RunConfig) -> str:
    """Return a resolved recipe as TOML; unset settings are left out, since TOML has no null."""
    tables = config.model_dump(exclude_none=True)
    return tomli_w.dumps(tables, multiline_strings=False)


def read_config(run: Path, plugins: Sequence[str] | None = None) -> RunConfig:
    """Return the recipe of a run folder.

    Args:
        run: The folder.
        plugins: Files to load in place of those that it names, which may have been moved.

    Raises:
        CheckpointError: The folder is not a run.
    """
    path = run / "config.toml"
    try:
        tables = read_tables(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{run}: is not a run folder (no config.toml in it); give a folder that `interlace "
            "train` made"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    model = tables.get("model", {})
    if plugins is None or not isinstance(model, dict):
        return validate(tables)
    table = cast(dict[str, object], model)
    named = table.get("plugins", [])
    if list(plugins) == named:
        return validate(tables)
    config = validate({**tables, "model": {**table, "plugins": list(plugins)}})
    was = config.model.model_copy(update={"plugins": named})
    return config.model_copy(update={"model": was})


def keep_plugins(run: Path, files: Sequence[str]) -> list[str]:
    """Copy a run's plug-in files into its folder, under `plugins`; return a note for each whose
    text is not what the run was begun with, of which the first is kept.
    """
    notes: list[str] = []
    for file in map(Path, files):
        kept = run / "plugins" / file.name
        text = file.expanduser().read_text(encoding="utf-8")
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, text)
        elif kept.read_text(encoding="utf-8") != text:
            notes.append(f"{file} has changed since this run was begun with what {kept} holds")
    return notes


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON file atomically, readable by people."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")
