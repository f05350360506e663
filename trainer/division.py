"""How an engine divides a model among the ranks, on paper, and what it holds beside its part.

FSDP2 divides weights, gradients and optimizer state alike, over the ranks of one replica. ZeRO
(Rajbhandari et al. 2020, arXiv 1910.02054) divides over all ranks: state in stage 1, gradients too
in stage 2, weights too in stage 3. DeepSpeed 0.19 holds more than the paper has: buckets in which
gradients meet, float32 partitions in which it sums them, and in stage 3 the weights that are needed
again soon.
"""

from dataclasses import dataclass

from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.schema import RunConfig

MOST_BUCKET_ELEMENTS = 200_000_000
"""Gradients that DeepSpeed reduces together: a bucket of that many is on the device all the time.
Its own default is 500 million.
"""

KEPT_ELEMENTS = 500_000_000
"""Weights that ZeRO-3 keeps whole at the turn from forward to backward: those that are needed again
within `stage3_max_reuse_distance`, a billion, on the way there and back.
"""

SUM_BYTES = 4
"""Of a gradient that is summed in float32."""


@dataclass(frozen=True)
class Division:
    """Among how many ranks each kind is divided; 1 where every rank has it whole."""

    weights: int
    gradients: int
    state: int

    @property
    def remedy(self) -> str:
        """What to type so that a rank has fewer weights."""
        if self.weights < self.state:
            return "parallel.zero_stage=3, which divides weights too"
        return "more ranks that share the weights (plan --ranks N)"


def division_of(config: RunConfig, ranks: int) -> Division:
    """Return the division of a recipe's engine over so many ranks."""
    if not uses_zero(config):
        shards = ranks // config.parallel.replicas
        return Division(shards, shards, shards)
    stage = config.parallel.zero_stage
    return Division(
        weights=ranks if stage == 3 else 1,
        gradients=ranks if stage >= 2 else 1,
        state=ranks,
    )


def share(parameters: int, ranks: int) -> int:
    """Return the largest part of one rank."""
    return -(-parameters // ranks)


def gathered_elements(config: RunConfig, division: Division, parameters: int, layers: int) -> int:
    """Return how many weights a rank holds whole at a time, beside its part of all: two layers, and
    with ZeRO-3 what it keeps for backward.
    """
    if division.weights == 1:
        return 0
    two_layers = 2 * parameters // layers
    return min(parameters, two_layers + KEPT_ELEMENTS) if uses_zero(config) else two_layers


def bucket_elements(parameters: int) -> int:
    """Return how many gradients DeepSpeed reduces together in a model of so many."""
    return min(MOST_BUCKET_ELEMENTS, parameters)


@dataclass(frozen=True)
class Buffers:
    """Bytes that an engine holds on one rank, whatever has which home.

    Attributes:
        device: On the device.
        host: On the host.
    """

    device: int = 0
    host: int = 0


def buffers_of(
    config: RunConfig, division: Division, parameters: int, element_bytes: int, *, offloads: bool
) -> Buffers:
    """Return what DeepSpeed holds of gradients and weights beside what is counted by home: there,
    every parameter has one float32 gradient where its state is.

    Args:
        config: The recipe.
        division: Its engine's.
        parameters: Of the whole model.
        element_bytes: Of a weight on the device.
        offloads: Whether any state is offloaded.
    """
    if not uses_zero(config):
        return Buffers()
    part, stage = share(parameters, division.state), config.parallel.zero_stage
    # In backward gradients meet in a bucket; in stage 1 all of them wait for its end.
    reducing = {
        1: SUM_BYTES * (bucket_elements(parameters) + parameters),
        2: element_bytes * bucket_elements(parameters),
        3: SUM_BYTES * bucket_elements(parameters),
    }[stage]
    if not offloads:
        return Buffers(max(reducing, updating_bytes(config, part)))
    if stage == 3:
        # Passes are summed in a partition of its own before they go to the one with the state.
        return Buffers(reducing, SUM_BYTES * part)
    # Passes are summed on the device, unless weights and sums have one dtype.
    summed = SUM_BYTES * part if element_bytes < SUM_BYTES else 0
    return Buffers(reducing + summed, element_bytes * part)


def updating_bytes(config: RunConfig, part: int) -> int:
    """Return what an update by torch's own optimizer takes on the device beside state: gradients
    once more, behind each other, and what the rule computes on the way, of everything that is
    updated at a time: a parameter group in stages 1 and 2, a subgroup in stage 3.
    """
    whole_groups = config.parallel.zero_stage < 3
    at_a_time = part if whole_groups else min(part, config.offload.subgroup_elements)
    return 2 * SUM_BYTES * at_a_time
