"""Wrong `[mup]` tables, each with the exact message a user sees."""

import pytest

from interlace.trainer.config import load_recipe
from interlace.trainer.errors import ConfigError

ON = ("mup.enabled=true", "mup.base_width=128")

FIXED = (
    "mup.without=threshold: under muP the coordinates of a gradient shrink as the width grows, so "
    "a fixed threshold that does not clips less and less, until nothing is clipped, at a rate "
    "meant for clipped coordinates; leave it out, or type "
    "coordinate_clip.policy=lagged_quantile, which follows by itself"
)

WRONG: dict[tuple[str, ...], str] = {
    ("mup.enabled=true",): (
        "mup.enabled=true: needs the width whose settings are carried over, at which nothing "
        "changes; type mup.base_width=256 to begin with this one"
    ),
    ("mup.enabled=true", "mup.base_width=30"): (
        "mup.base_width=30: model.heads=4: at width 30 in place of model.width=256 there would be "
        "0.46875 of them; type a model.width and widths that are multiples of each other, or "
        "mup.grows=head_width"
    ),
    (*ON, "optimizer.rule=clipped_sgd", "mup.without=['threshold']"): FIXED,
    (*ON, "coordinate_clip.stage=gradient", "mup.without=['threshold']"): FIXED,
    (
        *ON,
        "optimizer.rule=clipped_sgd",
        "coordinate_clip.stage=update",
        "mup.without=['threshold']",
    ): FIXED,
    ("mup.without=['router']",): (
        "mup.without=['router']: mup.enabled=false leaves out all rules; type mup.enabled=true or "
        "mup.without=[]"
    ),
}


@pytest.mark.parametrize("words", list(WRONG), ids=" ".join)
def test_a_wrong_table_is_refused_with_what_to_type(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", words)
    assert list(caught.value.problems) == [WRONG[words]]


@pytest.mark.parametrize(
    "words",
    [
        ("mup.enabled=true", "mup.base_width=256"),
        ("mup.enabled=true", "mup.base_width=96"),
        ("mup.enabled=true", "mup.base_width=30", "mup.grows=head_width"),
        (
            *ON,
            "optimizer.rule=clipped_sgd",
            "mup.without=['threshold']",
            "coordinate_clip.policy=lagged_quantile",
        ),
        (*ON, "mup.without=['threshold']"),
        (*ON, "coordinate_clip.stage=update", "mup.without=['threshold']"),
        (*ON, "mup.without=['router']"),
    ],
    ids=" ".join,
)
def test_what_the_messages_say_to_type_is_taken(words: tuple[str, ...]) -> None:
    load_recipe("quickstart", words)
