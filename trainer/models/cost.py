"""What a model costs: parameters, FLOPs per token, activation bytes; sums over the blocks' own
figures.

Activation bytes are those of eager execution on a CPU with documents masked. On a GPU the fused
norm and `torch.compile` keep less.
"""

from dataclasses import dataclass
from typing import Literal

from interlace.kernels.cross_entropy import tokens_per_chunk
from interlace.trainer.config.schema import ModelSection
from interlace.trainer.models.registry import Flops, mixer_class
from interlace.trainer.models.shapes import head_width

Checkpointing = Literal["none", "block", "selective"]

DOCUMENT_BYTES = 16
"""What all attention blocks share of one token: the range of keys it sees, and the documents it is
in as a query and as a key, four 32-bit numbers.
"""


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """One pass of a micro-batch through the model.

    Attributes:
        tokens: Tokens of the pass, a whole number of rows.
        sequence_length: Tokens per row.
        bytes_per_element: Size of the compute dtype.
        checkpointing: What backward recomputes: nothing, whole layers, or all but matrix products
            and attention.
    """

    tokens: int
    sequence_length: int
    bytes_per_element: int
    checkpointing: Checkpointing


def parameter_count(config: ModelSection, vocabulary_size: int) -> int:
    """Return the number of parameters, tied ones counted once."""
    blocks = sum(
        mixer_class(letter).parameter_count(config) + config.width for letter in config.pattern
    )
    tables = 1 if config.tie_embeddings else 2
    return config.layers * blocks + config.width + tables * vocabulary_size * config.width


def flops_per_token(config: ModelSection, vocabulary_size: int, sequence_length: int) -> Flops:
    """Return the matrix FLOPs of one token, forward and backward, as `FlopCounterMode` counts
    them; recomputation is not counted.
    """
    head = 2 * config.width * vocabulary_size
    total = Flops(head, 2 * head)
    for letter in config.pattern:
        cost = mixer_class(letter).flops_per_token(config, sequence_length)
        total += cost.times(config.layers)
    return total


def activation_bytes(config: ModelSection, vocabulary_size: int, forward: ForwardPass) -> int:
    """Return the peak of activations in one pass, in bytes: what is kept, and whichever is more of
    one chunk of logits, at the end of forward, and of the one layer that is being recomputed.
    """
    passing = logits_bytes(vocabulary_size, forward)
    if forward.checkpointing != "none":
        passing = max(passing, forward.tokens * layer_bytes(config, forward))
    return kept_bytes(config, forward) + passing


def logits_bytes(vocabulary_size: int, forward: ForwardPass) -> int:
    """Return the logits that exist at once, in bytes: of one chunk, in the compute dtype and in
    fp32. They are gone when forward is over.
    """
    rows = min(forward.tokens, tokens_per_chunk(vocabulary_size))
    return rows * vocabulary_size * (forward.bytes_per_element + 4)


def kept_bytes(config: ModelSection, forward: ForwardPass) -> int:
    """Return what stays in memory between forward and backward of one pass, in bytes."""
    element = forward.bytes_per_element
    match forward.checkpointing:
        case "none":
            layer = layer_bytes(config, forward)
        case "block":
            layer = config.width * element
        case "selective":
            layer = config.width * element + product_bytes(config, forward)
    rotary = 2 * head_width(config) * element
    # The head's gradient of its input is computed in the forward pass.
    head = config.width * element
    documents = DOCUMENT_BYTES if "A" in config.pattern else 0
    per_token = config.layers * layer + norm_bytes(config, element) + rotary + head + documents
    return forward.tokens * per_token


def layer_bytes(config: ModelSection, forward: ForwardPass) -> int:
    """Return what one layer keeps of one token without recomputation, in bytes."""
    total = 0
    for letter in config.pattern:
        saved = mixer_class(letter).saved_elements(config, forward.sequence_length)
        total += saved.kept * forward.bytes_per_element + 4 * saved.kept_wide
        total += norm_bytes(config, forward.bytes_per_element)
    return total


def product_bytes(config: ModelSection, forward: ForwardPass) -> int:
    """Return the results of one layer's matrix products and attention for one token, in bytes."""
    total = 0
    for letter in config.pattern:
        saved = mixer_class(letter).saved_elements(config, forward.sequence_length)
        total += saved.products * forward.bytes_per_element + 4 * saved.products_wide
    return total


def norm_bytes(config: ModelSection, bytes_per_element: int) -> int:
    """Return what a norm over the width keeps of one token, in bytes: its output, and in fp32 its
    input, the normalised values and the inverse root.
    """
    return config.width * bytes_per_element + 4 * (2 * config.width + 1)
