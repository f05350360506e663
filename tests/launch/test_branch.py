"""`interlace train --resume RUN --from-step STEP run.dir=NEW`: what its words mean together."""

from argparse import Namespace
from pathlib import Path

import pytest

from interlace.launch.branch import branch_recipe
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.run_folder import config_text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with its recipe."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_recipe("quickstart", ["train.steps=7", f"run.dir={folder}"]).config
    (folder / "config.toml").write_text(config_text(config), encoding="utf-8")
    return folder


def asked(resume: Path | None, *words: str) -> Namespace:
    """Return what the parser makes of a command line; the first override looks like a recipe."""
    return Namespace(
        resume=resume, from_step=5, recipe=words[0] if words else None, overrides=list(words[1:])
    )


def test_a_branch_has_the_recipe_of_its_run_and_what_is_said_anew(run: Path) -> None:
    words = (f"run.dir={run.parent / 'new'}", "data.skip_batches=9:11")
    config = branch_recipe(asked(run, *words)).config
    assert config.train.steps == 7
    assert config.data.skip_batches == "9:11"
    assert config.run.dir == str(run.parent / "new")
    assert (config.run.branch_of, config.run.branch_step) == (str(run), 5)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            (),
            "--from-step 5: a branch has a folder of its own, so that {run} stays as it is; type "
            "run.dir=NEW as well",
        ),
        (
            ("run.dir={run}",),
            "--from-step 5: a branch has a folder of its own, so that {run} stays "
            "as it is; type run.dir=NEW as well",
        ),
    ],
)
def test_a_branch_has_a_folder_of_its_own(words: tuple[str, ...], problem: str, run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        branch_recipe(asked(run, *(word.format(run=run) for word in words)))
    assert caught.value.problems == (problem.format(run=run),)


def test_a_step_belongs_to_a_run() -> None:
    with pytest.raises(ConfigError) as caught:
        branch_recipe(asked(None, "quickstart"))
    assert caught.value.problems == ("--from-step 5: of which run? Type --resume RUN as well",)
