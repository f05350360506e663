"""The same recipe at another width.

What grows with the width is everything that is counted in channels: heads of a fixed width (or a
fixed number of wider heads), feed-forward and expert widths that are given. What the recipe leaves
unset follows by its own rule. State width, groups and experts keep their size.
"""

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import head_width, kv_heads


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
        changes["heads"] = scaled_heads(model, width)
        # One pair of heads for all queries stays one; more keep their share of the heads.
        kept = kv_heads(model) if kv_heads(model) == 1 else None
        changes["kv_heads"] = kept or scaled("model.kv_heads", kv_heads(model), model.width, width)
    elif model.head_width is not None:
        changes["head_width"] = scaled("model.head_width", model.head_width, model.width, width)
    return model.model_copy(update=changes)


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


def scaled_heads(model: ModelSection, width: int) -> int:
    """Return the number of heads of the recipe's head width at another width."""
    heads, rest = divmod(model.heads * width, model.width)
    if heads and not rest:
        return heads
    narrow = width * model.heads
    raise ConfigError(
        [
            f"model.heads={model.heads}: at width {width} in place of model.width={model.width} "
            f"there would be {narrow / model.width:g} heads of {head_width(model)}; type a "
            "narrower model.head_width with more model.heads, or mup.grows=head_width"
        ]
    )
