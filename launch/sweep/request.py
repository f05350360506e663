"""What a sweep is asked for, read from words and checked before anything runs.

Learning rates live on a logarithmic axis: `Ladder` has a rung for every learning rate that may ever
be tried, the given ones and those that the grid may grow by.
"""

import math
import re
from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from interlace.trainer.errors import ConfigError

Parametrisation = Literal["mup", "standard"]

GROWTH_OCTAVES = 6.0
"""How far the grid may grow beyond either of its ends."""

CHOICES: dict[str, tuple[Parametrisation, ...]] = {
    "mup": ("mup",),
    "standard": ("standard",),
    "both": ("mup", "standard"),
}

NUMBER = re.compile(r"(?:2\*\*(?P<power>[+-]?\d+(?:\.\d+)?)|(?P<plain>\d*\.?\d+(?:[eE][+-]?\d+)?))")
LR_REMEDY = "type --lr 2**-12:2**-4, or a list as in --lr 0.001,0.002"
SWEPT = {
    "model.width": "--widths",
    "optimizer.peak_lr": "--lr",
    "run.seed": "--seeds",
    "mup.enabled": "--parametrisation",
    "mup.base_width": "--base-width",
}
"""Settings that have a word of their own."""

FARTHEST_OCTAVES = 64.0
"""No learning rate is that far from 1."""


@dataclass(frozen=True)
class Ladder:
    """Learning rates that may be tried, as log2.

    Attributes:
        grid: Those that were asked for, ascending.
        step: Octaves from one to the next where the grid grows.
    """

    grid: tuple[float, ...]
    step: float

    @property
    def rungs(self) -> tuple[float, ...]:
        """The grid and what it may grow by at both ends, ascending."""
        count = math.floor(GROWTH_OCTAVES / self.step + 1e-9)
        low = [round(self.grid[0] - n * self.step, 9) for n in range(count, 0, -1)]
        high = [round(self.grid[-1] + n * self.step, 9) for n in range(1, count + 1)]
        return (*low, *self.grid, *high)


@dataclass(frozen=True)
class Request:
    """A sweep as it was asked for.

    Attributes:
        recipe: Name or path.
        overrides: Settings of all trials.
        widths: Ascending.
        ladder: Learning rates.
        seeds: Number of seeds of every point.
        grid: Every combination of the other settings, each as `section.key=value` words.
        parametrisations: How everything follows the width.
        base_width: As given; None leaves it to the recipe.
        jobs: Trials at a time; None leaves it to the machine.
        on: Who runs them.
        store: Folder of results.
        output: Folder of what this sweep shows; None for the usual one.
        transfer_to: Recipe that the winner is for.
        dry_run: Whether trials are only listed.
        as_json: Whether JSON is printed.
    """

    recipe: str
    overrides: tuple[str, ...]
    widths: tuple[int, ...]
    ladder: Ladder
    seeds: int
    grid: tuple[tuple[str, ...], ...]
    parametrisations: tuple[Parametrisation, ...]
    base_width: int | None
    jobs: int | None
    on: Literal["local", "ray"]
    store: Path
    output: Path | None
    transfer_to: str | None
    dry_run: bool
    as_json: bool


def read_request(arguments: Namespace) -> Request:
    """Return what the words of a command ask for.

    Raises:
        ConfigError: Every word that cannot be read, with what to type instead.
    """
    problems: list[str] = []
    widths = read_widths(arguments.widths, problems)
    ladder = read_ladder(arguments.lr, problems)
    grid = read_grid(arguments.grid, problems)
    check_numbers(arguments, problems)
    problems += [
        f"{word}: the sweep sets it itself; leave it out and use --lr"
        for word in arguments.overrides
        if word.partition("=")[0].strip() == "optimizer.peak_lr"
    ]
    chosen = CHOICES[arguments.parametrisation]
    if arguments.transfer_to is not None and "mup" not in chosen:
        problems.append(
            f"--transfer-to {arguments.transfer_to}: nothing transfers under the standard "
            "parametrisation; type --parametrisation mup or both"
        )
    if problems:
        raise ConfigError(problems)
    assert ladder is not None, "what cannot be read is a problem"
    return Request(
        recipe=arguments.recipe,
        overrides=tuple(arguments.overrides),
        widths=widths,
        ladder=ladder,
        seeds=arguments.seeds,
        grid=grid,
        parametrisations=chosen,
        base_width=arguments.base_width,
        jobs=arguments.jobs,
        on=arguments.on,
        store=Path(arguments.store).expanduser().absolute(),
        output=Path(arguments.output).expanduser() if arguments.output else None,
        transfer_to=arguments.transfer_to,
        dry_run=arguments.dry_run,
        as_json=arguments.json,
    )


def read_widths(text: str, problems: list[str]) -> tuple[int, ...]:
    """Return the widths that a text lists, ascending."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        problems.append(
            f"--widths {text}: must be whole numbers with commas between; type --widths 64,128,256"
        )
        return ()
    return tuple(sorted({int(word) for word in words}))


def read_log2(word: str) -> float | None:
    """Return log2 of a positive number, written plainly or as a power of two; None for anything
    else, and for what no learning rate can be.
    """
    match = NUMBER.fullmatch(word.strip())
    if match is None:
        return None
    if match["power"] is not None:
        log2 = float(match["power"])
    else:
        value = float(match["plain"])
        log2 = math.log2(value) if 0 < value < math.inf else math.inf
    return log2 if abs(log2) <= FARTHEST_OCTAVES else None


def read_ladder(text: str, problems: list[str]) -> Ladder | None:
    """Return the learning rates that a text describes: `A:B`, `A:B:STEP` or a list."""
    if ":" not in text:
        listed = [read_log2(word) for word in text.split(",")]
        found = sorted({each for each in listed if each is not None})
        if None in listed:
            problems.append(f"--lr {text}: must be positive numbers or powers of 2; {LR_REMEDY}")
            return None
        return Ladder(tuple(found), 1.0)
    words = text.split(":")
    step = read_plain(words[2]) if len(words) == 3 else 1.0
    low, high = read_log2(words[0]), read_log2(words[1])
    if len(words) > 3 or low is None or high is None or step is None:
        problems.append(f"--lr {text}: cannot be read as FROM:TO or FROM:TO:STEP; {LR_REMEDY}")
        return None
    if low > high:
        problems.append(
            f"--lr {text}: begins above its end; type --lr {words[1]}:{words[0]}, smaller one first"
        )
        return None
    if not 0.125 <= step <= 2:
        problems.append(
            f"--lr {text}: steps of {step:g} octaves; type a step from 0.125 to 2, as in "
            f"--lr {words[0]}:{words[1]}:0.5"
        )
        return None
    count = math.floor((high - low) / step + 1e-9)
    return Ladder(tuple(round(low + n * step, 9) for n in range(count + 1)), step)


def read_plain(word: str) -> float | None:
    """Return a plain number, None for anything else."""
    try:
        return float(word)
    except ValueError:
        return None


def read_grid(words: list[str], problems: list[str]) -> tuple[tuple[str, ...], ...]:
    """Return every combination of further settings; one empty combination without any."""
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        values = split_values(text)
        if not equals or "." not in key or not all(values):
            problems.append(
                f"--grid {word}: must be a setting and its values; type "
                "--grid optimizer.beta2=0.95,0.99"
            )
            continue
        if key in SWEPT:
            problems.append(f"--grid {word}: has a word of its own; use {SWEPT[key]}")
            continue
        if key in axes:
            problems.append(f"--grid {word}: is there twice; type all values of {key} in one list")
            continue
        axes[key] = [f"{key}={value}" for value in dict.fromkeys(values)]
    return tuple(product(*axes.values()))


def split_values(text: str) -> list[str]:
    """Split at commas that are not within brackets or quotes."""
    return [
        part.strip() for part in re.split(r",(?![^\[]*\])(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", text)
    ]


def check_numbers(arguments: Namespace, problems: list[str]) -> None:
    """Add what is wrong with counts."""
    for name, remedy in (("seeds", "--seeds 3"), ("jobs", "--jobs 2"), ("base_width", None)):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            word = name.replace("_", "-")
            problems.append(
                f"--{word} {value}: must be 1 or more; type {remedy or '--base-width 64'}"
            )
