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
