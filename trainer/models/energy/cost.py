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
    """Return the peak of activations in one pass, in bytes."""
    return cost.activation_bytes(config.model, vocabulary_size, forward)
