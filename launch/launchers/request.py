"""Which run is started: its recipe, its folder, and the words that start a rank of it.

The folder is fixed, and made, before anything starts: every process, every machine and every later
start then means the same run, and a second launch chooses another folder.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.config.load import Recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.run_folder import claim_next_folder, next_folder


@dataclass(frozen=True)
class FixedRun:
    """A run whose folder is decided.

    Attributes:
        name: Of the run.
        folder: Run folder, absolute.
        words: What `interlace train` takes to start a rank of it, the folder included.
    """

    name: str
    folder: Path
    words: tuple[str, ...]


def fixed_run(arguments: Namespace, recipe: Recipe, claim: bool = True) -> FixedRun:
    """Decide the folder of a run.

    Args:
        arguments: `recipe`, `overrides` and `resume` of a launcher.
        recipe: What they name.
        claim: Whether to make the folder where the run numbers it itself; a dry run only looks.
    """
    asked = recipe.config.run
    if asked.dir:
        folder = Path(asked.dir).expanduser()
    else:
        folder = claim_next_folder(asked.name) if claim else next_folder(asked.name)
    folder = folder.absolute()
    return FixedRun(asked.name, folder, (*rank_words(arguments), f"run.dir={folder}"))


def rank_words(arguments: Namespace) -> tuple[str, ...]:
    """Return recipe and overrides as a rank takes them, whatever folder it is started in."""
    named, overrides = arguments.recipe, tuple(arguments.overrides)
    if arguments.resume is not None:
        saved = Path(arguments.resume).absolute() / "config.toml"
        first = () if named is None else (named,)
        return (str(saved), *first, *overrides)
    path = Path(named)
    return (str(path.absolute()) if path.is_file() else named, *overrides)


def positive(option: str, value: int) -> list[str]:
    """Return what is wrong with a count that must be 1 or more."""
    return [] if value >= 1 else [f"{option} {value}: must be 1 or more"]


def refuse(problems: list[str]) -> None:
    """Raise all problems of a request together, if there are any."""
    if problems:
        raise ConfigError(problems)
