"""What a model costs: parameters, FLOPs per token, activation bytes; sums over the blocks' own
figures.

Activation bytes are those of eager execution on a CPU with documents masked. On a GPU the fused
norm and `torch.compile` keep less.
"""

from dataclasses import dataclass
from typing import Literal

from interlace.kernels.cross_entropy import tokens_per_chunk
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.registry import Flops, Sparse, mixer_class
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
    tables = 1 if config.tie_embeddings else 2
    return stack_parameters(config) + tables * vocabulary_size * config.width


def stack_parameters(config: ModelSection) -> int:
    """Return the parameters of all layers and of the norm behind them."""
    blocks = sum(
        mixer_class(letter).parameter_count(config) + config.width
        for letters in layer_patterns(config)
        for letter in letters
    )
    return blocks + config.width


def idle_parameters(config: ModelSection) -> int:
    """Return the parameters of all layers that one token does not meet: of experts that others
    chose.
    """
    kinds = [mixer_class(letter) for letter in "".join(layer_patterns(config))]
    return sum(
        kind.parameter_count(config) - kind.active_parameter_count(config)
        for kind in kinds
        if isinstance(kind, Sparse)
    )


def flops_per_token(config: ModelSection, vocabulary_size: int, sequence_length: int) -> Flops:
    """Return the matrix FLOPs of one token, forward and backward, as `FlopCounterMode` counts
    them; recomputation is not counted.
    """
    head = 2 * config.width * vocabulary_size
    return Flops(head, 2 * head) + stack_flops(config, sequence_length)


def stack_flops(config: ModelSection, sequence_length: int) -> Flops:
    """Return the matrix FLOPs of one token in all layers."""
    total = Flops(0, 0)
    for letter in "".join(layer_patterns(config)):
        total += mixer_class(letter).flops_per_token(config, sequence_length)
    return total


def activation_bytes(config: ModelSection, vocabulary_size: int, forward: ForwardPass) -> int:
    """Return the peak of activations in one pass, in bytes: what is kept, and whichever is more of
    one chunk of logits, at the end of forward, and of the one layer that is being recomputed.
    """
    passing = logits_bytes(vocabulary_size, forward)
    if forward.checkpointing != "none":
        words = set(layer_patterns(config))
        largest = max(layer_bytes(config, letters, forward) for letters in words)
        passing = max(passing, forward.tokens * largest)
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
    words = layer_patterns(config)
    match forward.checkpointing:
        case "none":
            layers = sum(layer_bytes(config, letters, forward) for letters in words)
        case "block":
            layers = len(words) * config.width * element
        case "selective":
            layers = len(words) * config.width * element
            layers += sum(product_bytes(config, letters, forward) for letters in words)
    rotary = 2 * head_width(config) * element if config.positions == "rope" else 0
    # The head's gradient of its input is computed in the forward pass.
    head = config.width * element
    documents = DOCUMENT_BYTES if "A" in config.pattern else 0
    per_token = layers + norm_bytes(config, element) + rotary + head + documents
    return forward.tokens * per_token


def layer_bytes(config: ModelSection, letters: str, forward: ForwardPass) -> int:
    """Return what a layer of these blocks keeps of one token without recomputation, in bytes."""
    total = 0
    for letter in letters:
        saved = mixer_class(letter).saved_elements(config, forward.sequence_length)
        total += saved.kept * forward.bytes_per_element + 4 * saved.kept_wide
        total += norm_bytes(config, forward.bytes_per_element)
    return total


def product_bytes(config: ModelSection, letters: str, forward: ForwardPass) -> int:
    """Return the results of a layer's matrix products and attention for one token, in bytes."""
    total = 0
    for letter in letters:
        saved = mixer_class(letter).saved_elements(config, forward.sequence_length)
        total += saved.products * forward.bytes_per_element + 4 * saved.products_wide
    return total


def norm_bytes(config: ModelSection, bytes_per_element: int) -> int:
    """Return what a norm over the width keeps of one token, in bytes: its output, and in fp32 its
    input, the normalised values and the inverse root.
    """
    return config.width * bytes_per_element + 4 * (2 * config.width + 1)
