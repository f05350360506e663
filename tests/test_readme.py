"""Every fenced command and snippet of README and guides runs, in order, in an empty folder."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, *texts: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    found = (re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL) for text in texts)
    return [block for blocks in found for block in blocks]


COMMANDS = [
    *dict.fromkeys(
        line
        for block in blocks("bash", README, *GUIDES)
        for line in block.splitlines()
        if line.strip()
    )
]
LONG = (
    "interlace train quickstart_offload train.steps=8 observe.trace_steps=4:7 "
    "offload.strategy=stride offload.stride=2",
    "interlace mup check proxy --seeds 2 --widths 32,64,128,256",
    "interlace launch torchrun fault-drill run.dir=runs/two-ranks --nproc 2",
    "torchrun --standalone --nproc-per-node 2 -m interlace.launch.torchrun fault-drill "
    "train.steps=5",
)
"""Commands that are for `make test-long`; no other command uses what they leave."""


def named_files(*texts: str) -> dict[str, str]:
    """Return the blocks that stand for files: those whose first line names one."""
    pattern = r"^```\w+ (\S+)\n(.*?)^```"
    found = (re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL) for text in texts)
    return {name: content for blocks in found for name, content in blocks}


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the files that the guides show."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name, content in named_files(README, *GUIDES).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_long_commands_are_documented() -> None:
    assert set(LONG) <= set(COMMANDS)


@pytest.mark.parametrize(
    "command",
    [pytest.param(line, marks=pytest.mark.long if line in LONG else ()) for line in COMMANDS],
)
def test_a_documented_command_succeeds(command: str, empty_folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=empty_folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("snippet", blocks("python", README, *GUIDES))
def test_a_documented_snippet_runs(snippet: str, empty_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=empty_folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    from interlace.trainer.config import load_recipe

    [recipe] = blocks("toml", README)
    assert tomllib.loads(recipe)
    path = tmp_path / "mine.toml"
    path.write_text(recipe, encoding="utf-8")
    assert load_recipe(str(path)).config.data.source == "corpus/*.jsonl"


def test_the_plug_in_of_the_guide_is_the_one_that_is_tested() -> None:
    shown = named_files(*GUIDES)["token_shift.py"]
    assert shown == (ROOT / "tests" / "cases" / "token_shift.py").read_text(encoding="utf-8")


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["train", "test"]
    assert all(re.search(rf"^{command}:", makefile, flags=re.MULTILINE) for command in commands)


def test_every_command_is_in_the_readme() -> None:
    from interlace.launch.cli import build_parser

    help_text = build_parser().format_help()
    commands = re.findall(r"^    (\w+)(?:  +\w|$)", help_text, flags=re.MULTILINE)
    assert len(commands) == 18
    assert all(f"`interlace {command}" in README for command in commands)
