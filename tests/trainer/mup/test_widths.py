"""A recipe at another width: what grows, what does not, and what cannot be."""

import pytest
from mup_cases import FAMILIES, MAMBA, recipe

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import (
    expert_width,
    ffn_width,
    head_width,
    kv_heads,
    mamba_heads,
    mamba_inner_width,
)
from interlace.trainer.mup.widths import at_width, with_whole_heads


def test_heads_of_one_width_grow_in_number_and_given_widths_in_size() -> None:
    config = at_width(recipe(), 256)
    model = config.model
    assert (model.width, model.heads, kv_heads(model), head_width(model)) == (256, 32, 16, 8)
    assert ffn_width(model) == 512
    assert at_width(config, 128).model.model_copy(update={"head_width": None}) == recipe().model


def test_one_head_of_keys_stays_one() -> None:
    assert kv_heads(at_width(recipe("one key head"), 64).model) == 1


@pytest.mark.parametrize("given", [None, 1])
def test_a_single_head_grows_with_its_keys(given: int | None) -> None:
    single = recipe(model={"heads": 1, "kv_heads": given}, mup={"base_width": 128})
    model = at_width(single, 512).model
    assert (model.heads, kv_heads(model)) == (4, 4)
    narrow = at_width(recipe(model={"heads": 2, "kv_heads": 2}, mup={"base_width": 128}), 64)
    assert at_width(narrow, 256).model.kv_heads == 4


def test_queries_share_keys_at_every_width_as_they_do_here() -> None:
    grouped = recipe(model={"heads": 8, "kv_heads": 2}, mup={"base_width": 128})
    assert message(grouped, 64) == (
        "model.kv_heads=2: at width 64 in place of model.width=128 there would be 1 of them, which "
        "reads as one for all queries; type model.heads=16 model.kv_heads=4, or "
        "mup.grows=head_width"
    )
    shared = recipe(model={"heads": 2, "kv_heads": 1}, mup={"base_width": 128})
    assert message(shared, 64) == (
        "model.heads=2: at width 64 in place of model.width=128 there would be 1 of them, which "
        "reads as one for all queries; type model.heads=4, or mup.grows=head_width"
    )


def test_heads_keep_their_number_and_widen_where_the_recipe_says_so() -> None:
    model = at_width(recipe("wide heads"), 512).model
    assert (model.heads, head_width(model)) == (4, 128)
    given = recipe("wide heads", model={"head_width": 16, "heads": 4})
    model = at_width(given, 64).model
    assert (model.heads, head_width(model)) == (4, 8)


def test_experts_and_inner_channels_grow_while_state_and_groups_stay() -> None:
    model = at_width(recipe("experts"), 64).model
    assert (expert_width(model), model.moe_experts, model.moe_top_k) == (32, 4, 2)
    model = at_width(recipe("hybrid"), 64).model
    assert (mamba_inner_width(model), mamba_heads(model), model.mamba_state_width) == (128, 16, 8)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_recipe_at_its_own_width_is_itself(family: str) -> None:
    config = recipe(family)
    assert at_width(config, 128) == config


def message(config: RunConfig, width: int) -> str:
    with pytest.raises(ConfigError) as caught:
        at_width(config, width)
    [problem] = caught.value.problems
    return problem


def test_widths_without_whole_heads_are_refused_with_finer_ones() -> None:
    assert message(recipe(), 36) == (
        "model.heads=16: at width 36 in place of model.width=128 there would be 4.5 of them; type "
        "model.heads=64 model.kv_heads=32, or mup.grows=head_width"
    )
    finer = recipe(model={"heads": 64, "kv_heads": 32})
    assert at_width(finer, 36).model.kv_heads == 9


def test_widths_without_whole_keys_name_the_keys() -> None:
    config = recipe(model={"kv_heads": 2}, mup={"base_width": 64})
    assert message(config, 32) == (
        "model.kv_heads=2: at width 32 in place of model.width=128 there would be 0.5 of them; "
        "type model.heads=64 model.kv_heads=8, or mup.grows=head_width"
    )
    given = recipe(model={"heads": 8, "head_width": 16, "kv_heads": 2}, mup={"base_width": 64})
    assert "type model.heads=32 model.kv_heads=8 model.head_width=4, or" in message(given, 32)


def test_widths_that_no_split_of_heads_fits_are_refused_with_multiples() -> None:
    assert message(recipe(), 33) == (
        "model.heads=16: at width 33 in place of model.width=128 there would be 4.125 of them; "
        "type a model.width and widths that are multiples of each other, or mup.grows=head_width"
    )


def test_given_widths_that_would_not_be_whole_are_named() -> None:
    config = recipe("wide heads", model={"ffn_width": 250}, mup={"base_width": 64})
    assert message(config, 32) == (
        "model.ffn_width=250: at width 32 in place of model.width=128 it would be 62.5; type "
        "widths that leave it whole, or another model.ffn_width"
    )


def test_heads_of_mamba_that_do_not_divide_the_channels_are_named() -> None:
    config = recipe("hybrid", model={"mamba_head_width": 128}, mup={"base_width": 128})
    assert message(config, 32) == (
        "model.mamba_head_width=128: does not divide the inner width 64 of Mamba-2 at width 32; "
        "type model.mamba_head_width=64"
    )


def test_heads_are_split_until_all_widths_hold_whole_ones_and_it_is_said() -> None:
    config = recipe(model={"heads": 4, "kv_heads": 2}, mup={"base_width": 128})
    finer, note = with_whole_heads(config, [32, 64, 256])
    assert note == "attention has heads of 8, not 32, so that all widths hold whole ones"
    assert (finer.model.heads, finer.model.kv_heads, head_width(finer.model)) == (16, 8, 8)
    assert at_width(finer, 32).model.kv_heads == 2
    assert with_whole_heads(finer, [32, 64, 256]) == (finer, None)


def test_heads_of_both_kinds_are_split_together() -> None:
    hybrid = {"model": {**MAMBA, "heads": 4, "mamba_head_width": 64}, "mup": {"base_width": 128}}
    finer, note = with_whole_heads(recipe("hybrid", **hybrid), [16, 128])
    assert note == (
        "attention has heads of 16, not 32 and Mamba-2 has heads of 32, not 64, so that all "
        "widths hold whole ones"
    )
    assert finer.model.mamba_head_width == 32
    assert at_width(finer, 16).model.heads == 1


def test_widths_that_no_split_fits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at width 33 .* type a model\.width and widths"):
        with_whole_heads(recipe(model={"heads": 64, "kv_heads": 64}), [36, 33])


def test_widening_heads_need_no_split() -> None:
    config = recipe("wide heads")
    assert with_whole_heads(config, [32, 64, 4]) == (config, None)
