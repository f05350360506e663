"""`interlace train --resume RUN --from-step STEP run.dir=NEW`: the recipe of a branch of a run."""

from argparse import Namespace
from pathlib import Path

from interlace.trainer.config import load_recipe
from interlace.trainer.config.load import Recipe
from interlace.trainer.errors import ConfigError


def branch_recipe(arguments: Namespace) -> Recipe:
    """Return the recipe of the run that is branched, with the words of the command line and where
    the branch begins.

    Raises:
        ConfigError: A word is missing, or the recipe is wrong.
    """
    step, origin = arguments.from_step, arguments.resume
    words = [*([arguments.recipe] if arguments.recipe else []), *arguments.overrides]
    if origin is None:
        raise ConfigError([f"--from-step {step}: of which run? Type --resume RUN as well"])
    own = [word for word in words if word.startswith("run.dir=")]
    if not own or Path(own[-1].removeprefix("run.dir=")).absolute() == Path(origin).absolute():
        raise ConfigError(
            [
                f"--from-step {step}: a branch has a folder of its own, so that {origin} stays as "
                "it is; type run.dir=NEW as well"
            ]
        )
    saved = Path(origin).absolute() / "config.toml"
    begins = (f"run.branch_of={saved.parent}", f"run.branch_step={step}")
    return load_recipe(str(saved), [*words, *begins])
