"""What a model costs: parameters, FLOPs per token, activation bytes; sums over the blocks' own
figures.
"""

from interlace.trainer.config.schema import ModelSection
from interlace.trainer.models.registry import Flops, mixer_class
from interlace.trainer.models.shapes import head_width


def parameter_count(config: ModelSection, vocabulary_size: int) -> int:
    """Return the number of parameters, tied ones counted once."""
    blocks = sum(
        mixer_class(letter).parameter_count(config) + config.width for letter in config.pattern
    )
    tables = 1 if config.tie_embeddings else 2
    return config.layers * blocks + config.width + tables * vocabulary_size * config.width


def flops_per_token(config: ModelSection, vocabulary_size: int, sequence_length: int) -> Flops:
    """Return the matrix FLOPs of one token, forward and backward, as `FlopCounterMode` counts
    them.
    """
    head = 2 * config.width * vocabulary_size
    total = Flops(head, 2 * head)
    for letter in config.pattern:
        cost = mixer_class(letter).flops_per_token(config, sequence_length)
        total += cost.times(config.layers)
    return total


def activation_bytes(
    config: ModelSection,
    vocabulary_size: int,
    sequence_length: int,
    *,
    bytes_per_element: int,
    checkpointing: str,
) -> int:
    """Return what autograd keeps between forward and backward, in bytes per token.

    Args:
        config: The model.
        vocabulary_size: V; one chunk of fp32 logits is part of the peak.
        sequence_length: T.
        bytes_per_element: Size of the compute dtype.
        checkpointing: `none`, `block` (one layer's activations at a time) or `selective`.
    """
    expensive = cheap = wide = 0
    for letter in config.pattern:
        saved = mixer_class(letter).saved_elements(config)
        expensive += saved.expensive
        # Besides its own, every block keeps its norm's input and output, and the inverse root per
        # position.
        cheap += saved.cheap + 2 * config.width
        wide += saved.wide + 1
    whole_layer = (expensive + cheap) * bytes_per_element + 4 * wide
    if checkpointing == "none":
        stack = config.layers * whole_layer
    else:
        kept = config.width + (expensive if checkpointing == "selective" else 0)
        stack = config.layers * kept * bytes_per_element + whole_layer
    ends = 2 * config.width * bytes_per_element + 4
    rotary = 2 * 4 * head_width(config)
    return stack + ends + rotary + 4 * vocabulary_size
