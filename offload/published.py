"""What published systems take on a machine: ZeRO-3 offload and Deep Optimizer States.

Their updates are played by our simulator, with footprints counted from what their code does with
every byte (DeepSpeed 0.13, the fork of arXiv 2410.21316) and one staging slot; forward, backward
and the flush of gradients are closed formulas. What comes from their measurements and not from a
data sheet or their code: in the profiles, the rates that name their logs as source (CPU update and
host memory, collectives, attainable FLOPs); here, the seconds that an iteration takes beside its
phases. No figure was chosen to meet one result. Ranks of one node, data parallel, one sequence or
more per rank, activation checkpointing.
"""

from dataclasses import dataclass
from typing import Literal

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.loads import rates_of
from interlace.offload.schedule import Footprint, Home, Subgroup
from interlace.offload.simulator import Player

System = Literal["zero3", "zero3_async_flush", "deep_optimizer_states"]

SCALE_AND_ADAM_BYTES = 8 + 28
"""Host memory per parameter: a pass that scales every fp32 gradient, then Adam (16 read, 12
written)."""

CAST_BYTES = 6
"""fp32 read, 16 bits written."""

UPLOAD_BYTES = 4
"""The 16-bit weight goes through a staging copy: read and written, before the device reads it."""

FOREACH_ADAM_BYTES = 60
"""Device memory per parameter of an Adam in several passes (torch's foreach form)."""

CPU_PASSES = 1.5
"""Time of separate Adam and cast on the CPU, beside one pass over 28 bytes: that is how the
profiles' CPU rates were taken from the published ones."""

SUBGROUP_ELEMENTS = 120_000_000
"""A subgroup closes with the parameter that brings it to 100 million: 14 to 31 of them per rank of
6 to 15 billion on four."""

OVERHEAD_SECONDS: dict[System, float] = {
    "zero3": 0.35,
    "zero3_async_flush": 0.35,
    "deep_optimizer_states": 0.5,
}
"""What an iteration takes outside forward, backward and update: read off the logs of the "20B"
model on four H100. The interleaved system loses 0.15 s more in host-blocking waits on four
streams."""


@dataclass(frozen=True, slots=True)
class SeveralPasses(Footprint):
    """Bytes per parameter of a CPU update in several passes, gradients kept in fp32.

    Attributes:
        upload: Host memory that the weight's upload moves before the device reads it.
        blocking: Whether the CPU waits for each upload.
    """

    upload: int = 0
    blocking: bool = False

    @property
    def host_dram(self) -> int:
        """Scale, Adam, cast and upload; the gradient's arrival and the device's reading beside."""
        return self.gradient + SCALE_AND_ADAM_BYTES + CAST_BYTES + self.upload + self.weight

    @property
    def host_update(self) -> int:
        """What the time of the CPU counts in, at the rate of one pass."""
        return round(CPU_PASSES * (self.gradient + 2 * self.state))

    @property
    def device_update(self) -> int:
        """Several passes over the state."""
        return FOREACH_ADAM_BYTES

    @property
    def upload_blocks(self) -> bool:
        """Whether the CPU waits while the weights that it made are copied up."""
        return self.blocking


ZERO3 = SeveralPasses(weight=2, gradient=4, state=12, blocking=True)
INTERLEAVED = SeveralPasses(weight=2, gradient=4, state=12, upload=UPLOAD_BYTES)


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        parameters: Of the whole model.
        tokens: Per rank and pass.
        resident_share: Share of the optimizer state that never leaves the device.
        stride: With interleaving: one subgroup in so many is updated on the device.
        accumulation: Passes per iteration.
    """

    parameters: float
    tokens: int = 2048
    resident_share: float = 0.0
    stride: int = 2
    accumulation: int = 1


@dataclass(frozen=True)
class Iteration:
    """Seconds of an iteration and its phases."""

    forward: float
    backward: float
    update: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds from one iteration to the next."""
        return self.forward + self.backward + self.update + self.overhead


def predict_iteration(profile: HardwareProfile, system: System, load: Workload) -> Iteration:
    """Return what a published system takes for one iteration on one node.

    Raises:
        ValueError: The profile has no rates.
    """
    rates = rates_of(profile)
    compute = load.parameters * load.tokens / (profile.matmul_flops * rates.attainable_flops_share)
    ranks = rates.ranks_per_node
    gather = 2 * load.parameters * (ranks - 1) / ranks / rates.collective_bytes_per_second
    # Forward gathers the weights once. Backward recomputes: 2 + 4 FLOPs per weight and token, two
    # more gathers, and a reduce-scatter of gradients.
    forward, backward = max(2 * compute, gather), max(6 * compute, 3 * gather)
    return Iteration(
        forward=load.accumulation * forward,
        backward=load.accumulation * backward + flush_seconds(rates, system, load),
        update=update_seconds(rates, system, load),
        overhead=OVERHEAD_SECONDS[system],
    )


def flush_seconds(rates: OffloadRates, system: System, load: Workload) -> float:
    """Return how much gradients on their way to the host lengthen the backward passes.

    They are summed in the weights' dtype in host memory: every pass but the first brings the sum up
    and down again. The last one widens them.
    """
    offloaded = load.parameters / rates.ranks_per_node * (1 - load.resident_share)
    up_and_down = ZERO3.weight * (1 / rates.h2d_bytes_per_second + 1 / rates.d2h_bytes_per_second)
    sums = (load.accumulation - 1) * offloaded * up_and_down
    if system == "zero3":
        # A blocking copy of another type: 16 bits to pageable memory, widened by one host thread.
        return sums + offloaded * (
            ZERO3.weight / rates.pageable_bytes_per_second + 1 / rates.cpu_cast_elements_per_second
        )
    if system == "deep_optimizer_states":
        offloaded *= 1 - 1 / load.stride
    # Widened on the device, they cross as fp32.
    return sums + offloaded * ZERO3.gradient / rates.d2h_bytes_per_second


def update_seconds(rates: OffloadRates, system: System, load: Workload) -> float:
    """Return the time of the update phase, played event by event."""
    count = max(1, round(load.parameters / rates.ranks_per_node / SUBGROUP_ELEMENTS))
    elements = round(load.parameters / rates.ranks_per_node / count)
    interleaved = system == "deep_optimizer_states"
    subgroups = [Subgroup(elements, INTERLEAVED if interleaved else ZERO3)] * count
    resident = round(count * load.resident_share)
    homes = [Home.RESIDENT] * resident + [
        Home.STAGED if interleaved and not (number + 1) % load.stride else Home.HOST
        for number in range(count - resident)
    ]
    if not interleaved:
        # Weights are uploaded from pageable memory.
        pageable = {"h2d_bytes_per_second": rates.pageable_bytes_per_second}
        rates = rates.model_copy(update=pageable)
    # One staging set: a subgroup leaves before the next one comes.
    return Player(subgroups, rates).times(homes, 1).makespan
