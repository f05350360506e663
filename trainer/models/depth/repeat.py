"""Depth plan `repeat`: the words of the pattern in their order, all of it `model.layers` times."""

import re

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.depth import depth_plan

WORD = re.compile(r"(?P<letters>[A-Z]+)(?:\*(?P<times>[1-9]\d*))?")


def read_words(pattern: str) -> list[tuple[str, int]]:
    """Return the words of a pattern and how often each stands there: `AF MF*3` is AF once and MF
    three times.

    Raises:
        ValueError: A word is no row of capitals with an optional `*N` behind it.
    """
    words: list[tuple[str, int]] = []
    for word in pattern.split():
        read = WORD.fullmatch(word)
        if read is None:
            raise ValueError(f"{word!r} is not a word of capital letters, with *N behind it or not")
        words.append((read["letters"], int(read["times"] or 1)))
    if not words:
        raise ValueError("there is no word in it")
    return words


@depth_plan("repeat")
def repeat(config: ModelSection) -> tuple[str, ...]:
    """Return each word as often as it stands there, and all of them `layers` times."""
    once = [letters for letters, times in read_words(config.pattern) for _ in range(times)]
    return tuple(once * config.layers)
