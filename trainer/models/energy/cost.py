"""What an energy model costs: parameters, FLOPs of a training step, activation bytes.

One step of descent is a forward pass of the candidates and the gradient of its input. Its own
derivative takes four products for every one of the forward pass with torch's double backward, and
six graph-free: value and tangent are computed anew. Attention's double backward is twelve products
of the size of the scores (`kernels.attention.chunked.double_backward`).
"""

from typing import NamedTuple

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models import cost
from interlace.trainer.models.cost import ForwardPass
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.energy.context import last_attention
from interlace.trainer.models.energy.draws import replaying_rows
from interlace.trainer.models.registry import Flops, mixer_class
from interlace.trainer.models.shapes import head_width, kv_heads


def parameter_count(config: ModelSection, energy: EnergySection, vocabulary_size: int) -> int:
    """Return the number of trained parameters."""
    tables = 2 if energy.candidate_table == "own" else 1
    told = energy.steps * config.width if energy.variant != "none" else 0
    blocks = len("".join(layer_patterns(config)))
    modulations = 3 * blocks * config.width**2 if energy.variant == "adaln" else 0
    own = told + modulations + config.width + energy.learn_step_size
    return cost.stack_parameters(config) + tables * vocabulary_size * config.width + own


DUAL = 5.0
"""What a dual-number pass holds at most, as a multiple of what its layers keep in a plain pass:
measured between 3.9 (fp32) and 5.0 (bf16).
"""

GRAPH = 3.3
"""The same of the graph of one step with torch's own derivative, between forward and backward."""


class Products(NamedTuple):
    """Matrix FLOPs of one token through the candidate stream, forward.

    Attributes:
        layers: Linear maps of all blocks.
        table: Probabilities times the candidates' table.
        head: The energy.
        scores: One product of the size of the scores, in all attention blocks.
    """

    layers: int
    table: int
    head: int
    scores: int


def products_of(config: ModelSection, vocabulary_size: int, sequence_length: int) -> Products:
    """Return the products of a forward pass."""
    total = cost.stack_flops(config, sequence_length).forward
    letters = "".join(layer_patterns(config))
    scores = 2 * sequence_length * head_width(config) * config.heads * letters.count("A")
    table = 2 * vocabulary_size * config.width
    return Products(total - 2 * scores, table, 2 * config.width, scores)


def flops_per_token(
    config: ModelSection, energy: EnergySection, vocabulary_size: int, sequence_length: int
) -> Flops:
    """Return the matrix FLOPs of one token of a training step, with as many steps of descent as
    are taken on average; recomputation by activation checkpointing is not counted, nor what does
    not grow with the tokens (adaLN's signal).
    """
    one = products_of(config, vocabulary_size, sequence_length)
    taken = energy.steps - 1 + (energy.fewest_last_steps + energy.most_last_steps) / 2
    alone = energy.truncate or (energy.detach and energy.loss_steps == "last")
    trained = 1 if alone else taken
    # A step that follows on another passes its derivative on to it: value's and tangent's share.
    # torch's own derivative takes that product in vain where there is nobody to pass it on to.
    chained = 0 if alone or energy.detach or energy.inner_step == "plain" else taken - 1
    descent = 2 * (one.layers + one.table + one.head) + 7 * one.scores
    backward = trained * derivative_flops(one, energy) + chained * 2 * one.table
    context = context_flops(config, sequence_length)
    return Flops(
        context.forward + round(taken * descent),
        context.backward + round(backward),
    )


def derivative_flops(one: Products, energy: EnergySection) -> int:
    """Return the FLOPs of the derivative of one step that follows on no other."""
    if energy.inner_step == "plain":
        return 4 * one.layers + 4 * one.table + one.head + 17 * one.scores
    return 6 * one.layers + 4 * one.table + 6 * one.head + 29 * one.scores


def context_flops(config: ModelSection, sequence_length: int) -> Flops:
    """Return the FLOPs of one observed token: all blocks before the last attention block, of which
    keys and values are read.
    """
    words = layer_patterns(config)
    layer, block = last_attention(words)
    total = Flops(0, 0)
    for letter in "".join(words[:layer]) + words[layer][:block]:
        total += mixer_class(letter).flops_per_token(config, sequence_length)
    query = 2 * config.width * config.heads * head_width(config)
    read = 4 * config.width * kv_heads(config) * head_width(config)
    return total + Flops(query + read, 2 * read)


def activation_bytes(config: RunConfig, vocabulary_size: int, forward: ForwardPass) -> int:
    """Return the peak of activations in one pass, replayed rows included, in bytes: what is kept,
    and one step's dual-number pass, or the layer of it that is being recomputed.

    The pass is taken as `DUAL` times what its layers keep, and three candidates; with torch's own
    derivative as two candidates. The scores that attention has at once on a CPU are not in it.
    """
    rows = config.train.tokens_per_step // config.data.sequence_length
    share = len(replaying_rows(config.energy, rows)) / rows
    candidate = vocabulary_size * max(4, forward.bytes_per_element)
    layers = candidate_layers(config.model, forward)
    if config.energy.inner_step == "plain":
        passing = 2 * candidate
    else:
        at_once = sum(layers) if forward.checkpointing == "none" else max(layers)
        passing = round(DUAL * at_once) + 3 * candidate
    kept = kept_bytes(config.model, config.energy, vocabulary_size, forward)
    return round((kept + forward.tokens * passing) * (1 + share))


def kept_bytes(
    config: ModelSection, energy: EnergySection, vocabulary_size: int, forward: ForwardPass
) -> int:
    """Return what stays in memory between forward and backward of one pass, in bytes.

    That is the context stream up to the last keys and values, and candidates: those before every
    step that is trained, and those a loss is taken of. With torch's own derivative every trained
    step keeps a graph besides, measured as `GRAPH` times what its layers keep and two candidates.
    """
    taken = energy.steps - 1 + energy.most_last_steps
    alone = energy.truncate or (energy.detach and energy.loss_steps == "last")
    trained = 1 if alone else taken
    # Noise parts the candidates that are stepped from from those that a loss was taken of.
    apart = energy.langevin_noise > 0 and energy.loss_steps == "every"
    count = 2 * trained if apart else trained + 1
    candidate = vocabulary_size * max(4, forward.bytes_per_element)
    graphs = 0
    if energy.inner_step == "plain":
        layers = sum(candidate_layers(config, forward))
        graphs = trained * (round(GRAPH * layers) + 2 * candidate)
    return forward.tokens * (count * candidate + graphs + context_bytes(config, forward))


def candidate_layers(config: ModelSection, forward: ForwardPass) -> list[int]:
    """Return what each layer keeps of one candidate in a plain forward pass, in bytes."""
    # Attention that is differentiated twice is never handed the whole mask.
    shape = config.model_copy(update={"attention_backend": "chunked"})
    return [cost.layer_bytes(shape, letters, forward) for letters in layer_patterns(config)]


def context_bytes(config: ModelSection, forward: ForwardPass) -> int:
    """Return what the context stream keeps of one token, in bytes: its blocks up to the keys and
    values of the last attention block, and the tables of both streams.
    """
    words = layer_patterns(config)
    layer, block = last_attention(words)
    element = forward.bytes_per_element
    read = words[layer][:block]
    width = kv_heads(config) * head_width(config)
    # The last norm, and keys and values; their norms keep input, normalised values, and roots.
    last = cost.norm_bytes(config, element) + 2 * width * element
    if config.query_key_norm:
        last += 4 * (2 * width + kv_heads(config))
    tables = 4 * head_width(config) * element if config.positions == "rope" else 0
    if forward.checkpointing == "none":
        before = sum(cost.layer_bytes(config, letters, forward) for letters in words[:layer])
        before += cost.layer_bytes(config, read, forward)
        return before + last + tables + cost.DOCUMENT_BYTES
    # Every layer's input; keys and values are results of the layers, and outlive them.
    attention_blocks = "".join(words[:layer]).count("A") + read.count("A") + 1
    kept = (layer + 1) * config.width * element + attention_blocks * 2 * width * element
    if forward.checkpointing == "selective":
        kept += sum(cost.product_bytes(config, letters, forward) for letters in words[:layer])
        kept += cost.product_bytes(config, read, forward)
        # Queries and keys of the last block; values are products that are counted above already.
        kept += (config.heads * head_width(config) + width) * element
        kept -= (attention_blocks - 1) * width * element
    return kept + tables + cost.DOCUMENT_BYTES
