"""What published systems take on a machine: ZeRO-3 offload and Deep Optimizer States.

Counted from what their code does with every byte (DeepSpeed 0.13, the fork of arXiv 2410.21316),
on the machine's measured rates; nothing here is fitted to a result except the seconds per
iteration that their logs lose outside the three phases. Ranks of one node, data parallel, one
sequence or more per rank, activation checkpointing.
"""

from dataclasses import dataclass
from typing import Literal

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.performance_model import rates_of

System = Literal["zero3", "zero3_async_flush", "deep_optimizer_states"]

SCALE_AND_ADAM_BYTES = 8 + 28
"""Host memory per parameter: a pass that scales every fp32 gradient, then Adam (16 read, 12
written)."""

CAST_BYTES = 6
"""fp32 read, 16 bits written."""

UPLOAD_BYTES = 12 - CAST_BYTES
"""The 16-bit weight goes through a staging copy: written, read, and read by the device."""

STAGED_BYTES = 24
"""Master and both moments read and written once each by the copy engines."""

FOREACH_ADAM_BYTES = 60
"""Device memory per parameter of an Adam in several passes (torch's foreach form)."""

FLUSHED_BYTES = 4
"""Gradients are widened on the device and cross as fp32 once the flush is asynchronous."""

INTERLEAVING_OVERHEAD_SECONDS = 0.15
"""What the interleaved system loses per iteration beside ZeRO-3: host-blocking waits on four
streams (its logs: 0.5 s outside the phases against 0.35 s)."""


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        parameters: Of the whole model.
        tokens: Per rank and iteration.
        resident_share: Share of the optimizer state that never leaves the device.
        stride: With interleaving: one subgroup in so many is updated on the device.
    """

    parameters: float
    tokens: int = 2048
    resident_share: float = 0.0
    stride: int = 2


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
    interleaved = system == "deep_optimizer_states"
    return Iteration(
        forward=forward,
        backward=backward + flush_seconds(rates, system, load),
        update=update_seconds(rates, system, load),
        overhead=rates.step_overhead_seconds
        + (INTERLEAVING_OVERHEAD_SECONDS if interleaved else 0.0),
    )


def flush_seconds(rates: OffloadRates, system: System, load: Workload) -> float:
    """Return how much gradients on their way to the host lengthen backward."""
    offloaded = load.parameters / rates.ranks_per_node * (1 - load.resident_share)
    if system == "zero3":
        # A blocking copy of another type: 16 bits to pageable memory, widened by one host thread.
        return offloaded * (
            2 / rates.pageable_bytes_per_second + 1 / rates.cpu_cast_elements_per_second
        )
    if system == "deep_optimizer_states":
        offloaded *= 1 - 1 / load.stride
    return offloaded * FLUSHED_BYTES / rates.d2h_bytes_per_second


def update_seconds(rates: OffloadRates, system: System, load: Workload) -> float:
    """Return the time of the update phase."""
    offloaded = load.parameters * (1 - load.resident_share)
    per_rank = offloaded / rates.ranks_per_node
    dram = rates.host_dram_bytes_per_second
    if system != "deep_optimizer_states":
        upload = 2 * per_rank / rates.pageable_bytes_per_second
        return offloaded * (SCALE_AND_ADAM_BYTES + CAST_BYTES) / dram + upload
    on_device = 1 / load.stride
    host_bytes = SCALE_AND_ADAM_BYTES + CAST_BYTES + UPLOAD_BYTES
    memory = offloaded * (host_bytes * (1 - on_device) + STAGED_BYTES * on_device) / dram
    # One staging set: the tensors of a subgroup leave before those of the next arrive, so the
    # copy directions do not overlap; nor does the device's own update.
    links = (
        on_device
        * per_rank
        * 12
        * (1 / rates.h2d_bytes_per_second + 1 / rates.d2h_bytes_per_second)
    )
    device = on_device * per_rank * FOREACH_ADAM_BYTES / rates.device_update_bytes_per_second
    return max(memory, links) + device
