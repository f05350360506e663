"""Checks of the `[model]` table that concern one kind of block, where its letter is in the pattern.

Each returns None or one message with key, value, reason and remedy, as those in `checks`.
"""

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.shapes import mamba_heads, mamba_inner_width


def mamba_heads_divide_inner_width(config: RunConfig) -> str | None:
    """Heads of Mamba-2 share its inner width evenly."""
    model = config.model
    inner = mamba_inner_width(model)
    if "M" not in model.pattern or (inner and inner % model.mamba_head_width == 0):
        return None
    if inner == 0:
        return (
            f"model.mamba_expand={model.mamba_expand}: leaves no channel of "
            f"model.width={model.width}; type model.mamba_expand=2"
        )
    widths = range(1, min(inner, model.mamba_head_width) + 1)
    fitting = max(width for width in widths if inner % width == 0)
    return (
        f"model.mamba_head_width={model.mamba_head_width}: does not divide the inner width "
        f"{inner} of Mamba-2 (model.width={model.width} times "
        f"model.mamba_expand={model.mamba_expand:g}), so the last head would be cut; type "
        f"model.mamba_head_width={fitting}"
    )


def mamba_groups_divide_heads(config: RunConfig) -> str | None:
    """Every group of Mamba-2 serves the same number of heads."""
    model = config.model
    heads = mamba_heads(model)
    # What does not split into heads has a message of its own.
    if "M" not in model.pattern or mamba_heads_divide_inner_width(config) is not None:
        return None
    if heads % model.mamba_groups == 0:
        return None
    divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
    return (
        f"model.mamba_groups={model.mamba_groups}: must divide the {heads} heads of Mamba-2 (inner "
        f"width {mamba_inner_width(model)} in heads of "
        f"model.mamba_head_width={model.mamba_head_width}); type one of "
        f"model.mamba_groups={', '.join(divisors)}"
    )


def experts_are_as_many_as_chosen(config: RunConfig) -> str | None:
    """A token cannot go through more experts than there are."""
    model = config.model
    if "E" not in model.pattern or model.moe_top_k <= model.moe_experts:
        return None
    return (
        f"model.moe_top_k={model.moe_top_k}: a token cannot go through more experts than "
        f"model.moe_experts={model.moe_experts}; type model.moe_top_k={model.moe_experts} or "
        f"model.moe_experts={model.moe_top_k}"
    )


def experts_are_weighed(config: RunConfig) -> str | None:
    """The weights of the chosen experts sum to one; that of a single one says nothing."""
    model = config.model
    if "E" not in model.pattern or model.moe_top_k > 1 or model.moe_experts == 1:
        return None
    return (
        "model.moe_top_k=1: the weights of the chosen experts sum to one, so a single one always "
        "weighs 1 and the likelihood could not train the router; type model.moe_top_k=2"
    )
