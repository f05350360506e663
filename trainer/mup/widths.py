"""The same recipe at another width.

What grows with the width is everything that is counted in channels: heads of a fixed width (or a
fixed number of wider heads), feed-forward and expert widths that are given. What the recipe leaves
unset follows by its own rule. State width, groups and experts keep their size.
"""

from collections.abc import Sequence

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import head_width, kv_heads, mamba_heads, mamba_inner_width


def at_width(config: RunConfig, width: int) -> RunConfig:
    """Return a recipe whose model has another width and otherwise the same shape.

    Raises:
        ConfigError: A width or a number of heads would not be whole.
    """
    return config.model_copy(update={"model": model_at_width(config, width)})


def model_at_width(config: RunConfig, width: int) -> ModelSection:
    """Return the `[model]` table at another width; see `at_width`."""
    model = config.model
    if width == model.width:
        return model
    changes: dict[str, object] = {"width": width}
    for key in ("ffn_width", "moe_expert_width"):
        given = getattr(model, key)
        if given is not None:
            changes[key] = scaled(f"model.{key}", given, model.width, width)
    if config.mup.grows == "heads":
        changes["head_width"] = head_width(model)
        changes["heads"], changes["kv_heads"] = scaled_heads(model, width)
    elif model.head_width is not None:
        changes["head_width"] = scaled("model.head_width", model.head_width, model.width, width)
    found = model.model_copy(update=changes)
    if not holds_whole_mamba_heads(found):
        finer = finer_mamba_heads(model, [width])
        raise ConfigError(
            [
                f"model.mamba_head_width={model.mamba_head_width}: does not divide the inner width "
                f"{mamba_inner_width(found)} of Mamba-2 at width {width}; type "
                f"model.mamba_head_width={finer.mamba_head_width}"
            ]
        )
    return found


def scaled(key: str, value: int, width: int, wanted: int) -> int:
    """Return a size that grows with the width, or raise `ConfigError` if it would not be whole."""
    size, rest = divmod(value * wanted, width)
    if rest or not size:
        raise ConfigError(
            [
                f"{key}={value}: at width {wanted} in place of model.width={width} it would be "
                f"{value * wanted / width:g}; type widths that leave it whole, or another {key}"
            ]
        )
    return size


def scaled_heads(model: ModelSection, width: int) -> tuple[int, int]:
    """Return query heads, and key and value heads, of the recipe's head width at another width. One
    pair of key and value for all queries stays one; more keep their share.

    Raises:
        ConfigError: They would not be whole, or too few to tell how many queries share a pair.
    """
    served = kv_heads(model)
    if holds_whole_heads(model, width):
        shared = served == 1 < model.heads
        return model.heads * width // model.width, 1 if shared else served * width // model.width
    found = finer_heads(model, [width])
    remedy = "a model.width and widths that are multiples of each other"
    if found is not None:
        remedy = f"model.heads={found.heads}"
        same = model.kv_heads is None or found.kv_heads == model.kv_heads
        remedy += "" if same else f" model.kv_heads={found.kv_heads}"
        remedy += "" if model.head_width is None else f" model.head_width={found.head_width}"
    key, value = ("heads", model.heads)
    if model.heads * width % model.width == 0 and served > 1:
        key, value = ("kv_heads", served)
    count = value * width / model.width
    # Of one head, or one pair of several, it could not be told what it becomes in a wider model.
    few = ", which reads as one for all queries" if count == 1 else ""
    raise ConfigError(
        [
            f"model.{key}={value}: at width {width} in place of model.width={model.width} there "
            f"would be {count:g} of them{few}; type {remedy}, or mup.grows=head_width"
        ]
    )


def holds_whole_heads(model: ModelSection, width: int) -> bool:
    """Whether another width holds whole heads of the recipe's head width, and queries share keys
    there as they do here: all one pair, some of them one, or each its own.
    """
    served = kv_heads(model)
    counts = [model.heads] if served in (1, model.heads) else [model.heads, served]
    least = 1 if served == model.heads else 2
    return all(
        count * width % model.width == 0 and count * width // model.width >= least
        for count in counts
    )


def finer_heads(model: ModelSection, widths: Sequence[int]) -> ModelSection | None:
    """Return the same model with the fewest more and narrower heads that all widths hold whole
    numbers of; None if there is no such model.
    """
    served = kv_heads(model)
    for split in range(1, head_width(model) // 2 + 1):
        width, rest = divmod(head_width(model), split)
        if rest or width % 2:
            continue
        finer = model.model_copy(
            update={
                "heads": model.heads * split,
                "kv_heads": served if served == 1 < model.heads else served * split,
                "head_width": width,
            }
        )
        if all(holds_whole_heads(finer, each) for each in widths):
            return finer
    return None


def holds_whole_mamba_heads(model: ModelSection) -> bool:
    """Whether the heads of Mamba-2, where there are any, are whole and groups of them even."""
    inner = mamba_inner_width(model)
    heads, rest = divmod(inner, model.mamba_head_width)
    return "M" not in model.pattern or (heads > 0 and not rest and heads % model.mamba_groups == 0)


def finer_mamba_heads(model: ModelSection, widths: Sequence[int], least: int = 1) -> ModelSection:
    """Return the same model with the widest heads of Mamba-2 that all widths hold whole numbers of,
    and `least` at the least, if that can be.
    """
    for width in range(model.mamba_head_width, 1, -1):
        finer = model.model_copy(update={"mamba_head_width": width})
        there = [finer.model_copy(update={"width": each}) for each in widths]
        if all(holds_whole_mamba_heads(each) and mamba_heads(each) >= least for each in there):
            return finer
    return model.model_copy(update={"mamba_head_width": 1})


def with_whole_heads(
    config: RunConfig, widths: Sequence[int], least: int = 1
) -> tuple[RunConfig, str | None]:
    """Return a recipe whose heads all of these widths hold whole numbers of, split finer if need
    be, and a note about it for a person.

    Args:
        config: The recipe.
        widths: Widths that it will be given.
        least: Heads of Mamba-2 at the narrowest; what a single head does is not what many do.

    Raises:
        ConfigError: There is no such split.
    """
    model, notes = config.model, list[str]()
    everywhere = [model.width, *widths]
    if config.mup.grows == "heads" and not all(holds_whole_heads(model, each) for each in widths):
        finer = finer_heads(model, everywhere)
        if finer is None:
            wrong = [each for each in widths if not holds_whole_heads(model, each)]
            hopeless = [each for each in wrong if finer_heads(model, [each]) is None]
            scaled_heads(model, [*hopeless, *wrong][0])
            raise AssertionError("a width without whole heads is refused")
        notes.append(f"attention has heads of {head_width(finer)}, not {head_width(model)}")
        model = finer
    finer = finer_mamba_heads(model, everywhere, least) if "M" in model.pattern else model
    if finer.mamba_head_width != model.mamba_head_width:
        notes.append(f"Mamba-2 has heads of {finer.mamba_head_width}, not {model.mamba_head_width}")
        model = finer
    if not notes:
        return config, None
    note = f"{' and '.join(notes)}, so that all widths hold whole ones"
    return config.model_copy(update={"model": model}), note
