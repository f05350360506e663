"""What sharding costs in traffic, on paper.

FSDP2 gathers the weights twice in every pass and reduces and scatters the gradients once; replicas
then sum their shards of gradients (HSDP). A collective moves as fast as the slower of two ways:
inside a node, where every rank receives all but its own share at the collective rate, and between
nodes, where a node brings in what it lacks through the adapters of all its ranks together.
`interlace plan` has no other account of it: the table and the sweep both ask here.
"""

from dataclasses import dataclass

from interlace.offload.hardware import OffloadRates

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
    """

    parameters: int
    element_bytes: int
    ranks: int
    ranks_per_host: int
    replicas: int
    passes: int


def communication_seconds(traffic: Traffic, rates: OffloadRates | None) -> float:
    """Return the seconds of one step's collectives, hidden or not; 0 while rates are unknown."""
    if rates is None or traffic.ranks == 1:
        return 0.0
    shards = traffic.ranks // traffic.replicas
    weights = traffic.element_bytes * traffic.parameters
    gradients = REDUCED_BYTES * traffic.parameters
    sharded = 2 * weights + gradients
    seconds = gathering_seconds(sharded, shards, traffic.ranks_per_host, rates)
    seconds += summing_seconds(gradients / shards, traffic, rates)
    return traffic.passes * seconds


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
