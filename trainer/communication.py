"""What sharding costs in traffic, on paper.

FSDP2 gathers the weights twice in every pass and reduces and scatters the gradients once; replicas
then sum their shards of gradients (HSDP). ZeRO-3 does the same, but for the weights that it keeps
from forward to backward. ZeRO-2 sums the whole gradients in every pass and ZeRO-1 once in a step,
both of them as all-reduce, as DeepSpeed has it; they gather the new weights once.

A collective moves as fast as the slower of two ways: inside a node, where every rank receives all
but its own share at the collective rate, and between nodes, where a node brings in what it lacks
through the adapters of all its ranks together. `interlace plan` has no other account of it: the
table and the sweep both ask here.
"""

from dataclasses import dataclass

from interlace.offload.hardware import OffloadRates
from interlace.trainer.division import KEPT_ELEMENTS

REDUCED_BYTES = 4
"""Gradients are reduced in float32."""


@dataclass(frozen=True)
class Traffic:
    """What is exchanged in one step.

    Attributes:
        parameters: Of the whole model.
        element_bytes: Of a weight on the device.
        ranks: Of the run.
        ranks_per_host: Ranks that share one node.
        replicas: Groups of ranks that each hold a whole copy.
        passes: Forward and backward passes of a step.
        zero_stage: Of DeepSpeed's ZeRO; None for FSDP2.
    """

    parameters: int
    element_bytes: int
    ranks: int
    ranks_per_host: int
    replicas: int
    passes: int
    zero_stage: int | None = None


def communication_seconds(traffic: Traffic, rates: OffloadRates | None) -> float:
    """Return the seconds of one step's collectives, hidden or not; 0 while rates are unknown."""
    if rates is None or traffic.ranks == 1:
        return 0.0
    if traffic.zero_stage is not None:
        size = zero_bytes(traffic, traffic.zero_stage)
        return gathering_seconds(size, traffic.ranks, traffic.ranks_per_host, rates)
    shards = traffic.ranks // traffic.replicas
    weights = traffic.element_bytes * traffic.parameters
    gradients = REDUCED_BYTES * traffic.parameters
    sharded = 2 * weights + gradients
    seconds = gathering_seconds(sharded, shards, traffic.ranks_per_host, rates)
    seconds += summing_seconds(gradients / shards, traffic, rates)
    return traffic.passes * seconds


def zero_bytes(traffic: Traffic, stage: int) -> float:
    """Return the bytes that the ranks of ZeRO gather, or reduce and scatter, together in one step;
    an all-reduce is both.
    """
    weights = traffic.element_bytes * traffic.parameters
    gradients = REDUCED_BYTES * traffic.parameters
    if stage == 1:
        return 2 * gradients + weights
    if stage == 2:
        return traffic.passes * 2 * gradients + weights
    again = traffic.element_bytes * max(0, traffic.parameters - KEPT_ELEMENTS)
    return traffic.passes * (weights + again + gradients)


def gathering_seconds(size: float, shards: int, ranks_per_host: int, rates: OffloadRates) -> float:
    """Return the seconds in which neighbouring ranks gather, or reduce and scatter, so many bytes
    that they hold together.
    """
    here = min(shards, ranks_per_host)
    nodes = -(-shards // here)
    within = size * (shards - 1) / shards / rates.collective_bytes_per_second
    between = size * (1 - 1 / nodes) / (here * rates.network_bytes_per_second)
    return max(within, between)


def summing_seconds(size: float, traffic: Traffic, rates: OffloadRates) -> float:
    """Return the seconds in which replicas sum so many bytes each: a ring carries them twice."""
    replicas = traffic.replicas
    near = traffic.ranks <= traffic.ranks_per_host
    rate = rates.collective_bytes_per_second if near else rates.network_bytes_per_second
    return 2 * size * (replicas - 1) / replicas / rate
