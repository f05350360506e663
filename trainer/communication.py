"""What sharding costs in traffic, on paper.

FSDP2 gathers the weights twice in every pass and reduces and scatters the gradients once. A ring
receives all but its own share, over the slowest link on its way: inside a node at the node's
collective rate, across nodes at the network's. `interlace plan` has no other account of it: the
table and the sweep both ask here.
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
    within = traffic.ranks <= traffic.ranks_per_host
    rate = rates.collective_bytes_per_second if within else rates.network_bytes_per_second
    shards = traffic.ranks // traffic.replicas
    weights = traffic.element_bytes * traffic.parameters * (shards - 1) / shards
    gradients = REDUCED_BYTES * traffic.parameters * (traffic.ranks - 1) / traffic.ranks
    return traffic.passes * (2 * weights + gradients) / rate
