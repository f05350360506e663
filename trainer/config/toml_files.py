"""TOML as far as recipes need it: files of bounded size and bounded nesting.

A recipe is data and nothing in it is run, but the parser itself can be made to work: a key of a
hundred thousand dotted parts takes it minutes and all memory, and brackets nested by the thousand
exhaust its stack. Both are refused before, or as, they are met.
"""

import tomllib
from pathlib import Path

LIMIT_BYTES = 2**20
"""Size of the largest recipe that is read."""

MOST_DOTS = 500
"""Dots in one line; a key of a recipe has one, and no key is longer than a line."""


def read_tables(path: Path) -> dict[str, object]:
    """Return the tables of a TOML file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not UTF-8, not TOML, or larger or deeper than any recipe.
    """
    with path.open("rb") as file:
        content = file.read(LIMIT_BYTES + 1)
    if len(content) > LIMIT_BYTES:
        raise ValueError(f"larger than the {LIMIT_BYTES:,} bytes that are ever read of a recipe")
    return parse_tables(content.decode("utf-8"))


def parse_tables(text: str) -> dict[str, object]:
    """Return the tables of a TOML text.

    Raises:
        ValueError: It is not TOML, or nested deeper than any recipe.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MOST_DOTS:
            raise ValueError(f"more than {MOST_DOTS} dots in a line (at line {number})")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
