"""Widths that a recipe may leave unset."""

from interlace.trainer.config.model_section import ModelSection


def head_width(config: ModelSection) -> int:
    """Width of one attention head: as given, else `width / heads`."""
    return config.head_width or config.width // config.heads


def kv_heads(config: ModelSection) -> int:
    """Key and value heads: as given, else as many as query heads."""
    return config.kv_heads or config.heads


def ffn_width(config: ModelSection) -> int:
    """Hidden width of a feed-forward block: as given, else 8/3 of the width, rounded up to 64."""
    return config.ffn_width or -(-8 * config.width // (3 * 64)) * 64


def mamba_inner_width(config: ModelSection) -> int:
    """Channels of a Mamba-2 block: the width times `mamba_expand`, rounded down."""
    return int(config.mamba_expand * config.width)


def mamba_heads(config: ModelSection) -> int:
    """Heads of a Mamba-2 block, each of `mamba_head_width` channels."""
    return mamba_inner_width(config) // config.mamba_head_width


def mamba_conv_channels(config: ModelSection) -> int:
    """Channels that a Mamba-2 block convolves: x, B and C."""
    return mamba_inner_width(config) + 2 * config.mamba_groups * config.mamba_state_width


def mamba_projection_width(config: ModelSection) -> int:
    """Rows of a Mamba-2 block's input projection: z, x, B, C and one step per head."""
    return mamba_inner_width(config) + mamba_conv_channels(config) + mamba_heads(config)


def expert_width(config: ModelSection) -> int:
    """Hidden width of one expert: as given, else that of a feed-forward block divided by the
    experts that a token goes through, rounded up to 8.
    """
    active = config.moe_top_k + config.moe_shared_experts
    return config.moe_expert_width or -(-ffn_width(config) // (8 * active)) * 8
