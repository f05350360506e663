"""Patterns spell layers: in their order, repeated, or mixed as evenly as can be."""

from itertools import pairwise

import pytest

from interlace.trainer.config import load_recipe
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.cost import parameter_count
from interlace.trainer.models.depth import DEPTH_PLANS, depth_plan, layer_patterns


def layers(pattern: str, times: int = 1, plan: str = "repeat") -> str:
    """Return the stack as words with a space between."""
    shape = ModelSection(pattern=pattern, layers=times, depth_plan=plan)
    return " ".join(layer_patterns(shape))


@pytest.mark.parametrize(
    ("pattern", "times", "stack"),
    [
        ("AF", 3, "AF AF AF"),
        ("AFF", 1, "AFF"),
        ("AMF MF*2", 2, "AMF MF MF AMF MF MF"),
        ("  MF*2   AF ", 1, "MF MF AF"),
        ("A*1", 2, "A A"),
    ],
)
def test_words_are_layers_in_their_order(pattern: str, times: int, stack: str) -> None:
    assert layers(pattern, times) == stack


def test_spread_keeps_the_rare_word_away_from_the_front_and_from_its_like() -> None:
    assert layers("AF MF*3", 2, "spread") == "MF MF AF MF MF MF AF MF"
    stack = layers("AF*7 MF*57", 1, "spread").split()
    places = [place for place, word in enumerate(stack) if word == "AF"]
    assert len(stack) == 64 and len(places) == 7 and places[0] > 0
    assert {after - before for before, after in pairwise(places)} <= {9, 10}


def test_spread_holds_as_many_of_each_word_whatever_the_numbers() -> None:
    for rare in range(1, 6):
        for middle in range(1, 6):
            for common in range(6, 9):
                pattern = f"AF*{rare} EF*{middle} MF*{common}"
                stack = layers(pattern, 1, "spread").split()
                assert [stack.count(word) for word in ("AF", "EF", "MF")] == [rare, middle, common]
                assert stack[0] == "MF"


def test_a_single_layer_may_stand_first() -> None:
    assert layers("AF", 1, "spread") == "AF"


@pytest.mark.parametrize("pattern", ["af", "A-F", "AF*0", "AF*", "*2", " "])
def test_a_word_is_capitals_and_perhaps_a_number(pattern: str) -> None:
    with pytest.raises(
        ConfigError, match=r"write layers as words, as in model\.pattern='AF MF\*3'"
    ):
        load_recipe("quickstart", [f"model.pattern='{pattern}'"])


def test_a_recipe_counts_the_layers_that_its_pattern_spells() -> None:
    word = parameter_count(ModelSection(pattern="AF", layers=6), 100)
    assert parameter_count(ModelSection(pattern="AF*3", layers=2), 100) == word


def test_a_plan_of_ones_own_is_a_function_with_a_name() -> None:
    try:

        @depth_plan("sandwich")
        def sandwich(config: ModelSection) -> tuple[str, ...]:
            return ("F", *[config.pattern] * config.layers, "F")

        assert layers("AF", 2, "sandwich") == "F AF AF F"
        assert "sandwich" in DEPTH_PLANS.names()
        with pytest.raises(ValueError, match="depth plan sandwich: is registered already"):
            depth_plan("sandwich")(sandwich)
    finally:
        DEPTH_PLANS.entries.pop("sandwich", None)
