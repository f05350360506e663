"""What the performance model decides on and what it decides: subgroups, homes, schedules.

A subgroup is a slab of one rank's shard of one parameter group. It has one home: its state stays on
the device (`resident`), visits the device in every update (`staged`), or stays on the host and is
updated there (`host`). `Footprint` counts the bytes that one parameter of a subgroup moves and
occupies; the counts follow the table of Deep Optimizer States (arXiv 2410.21316) and its
successors, with a one-pass update on the CPU.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

Strategy = Literal["none", "host", "stride", "optimal"]
"""All resident; all on the host; every k-th staged; as the performance model decides."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class MemoryShortage(ValueError):
    """State does not fit: says what is needed, what is there and which setting helps."""


class Home(StrEnum):
    """Where a subgroup's state lives, and so who updates it."""

    RESIDENT = "resident"
    STAGED = "staged"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per parameter of one subgroup.

    Attributes:
        weight: The weight that the model computes with, on the device.
        gradient: The gradient, where it is made and where it travels.
        state: Everything the update rule keeps: master weight and moments. With a split master it
            includes the high plane, which is the weight itself.
        weight_is_master: Whether the master is the device's weight itself, or that and a 16-bit
            remainder: then the weight, or high plane, needs no copy of its own.
        gradient_with_state: Whether gradients arrive where the state lives, as where another
            program brings them: a staged one's then waits on the host and is copied in with it.
    """

    weight: int
    gradient: int
    state: int
    weight_is_master: bool = False
    gradient_with_state: bool = False

    @property
    def staged_copy(self) -> int:
        """Copied in, and copied out again, per staged parameter: the state that the device lacks.

        Where the weight is the master, or its high plane, the device holds that already.
        """
        return self.state - (self.weight if self.weight_is_master else 0)

    @property
    def copied_in(self) -> int:
        """Bytes that enter a slot per staged parameter; `staged_copy` of them leave it again."""
        return self.staged_copy + (self.gradient if self.gradient_with_state else 0)

    @property
    def gradient_copy(self) -> int:
        """Bytes that a backward pass sends to the host per parameter that the CPU updates.

        Gradients are made in the weight's dtype; where they are kept wider, they are summed there.
        """
        return min(self.weight, self.gradient)

    @property
    def staged_dram(self) -> int:
        """Bytes of host memory read and written per staged parameter."""
        return self.copied_in + self.staged_copy

    @property
    def host_dram(self) -> int:
        """Bytes of host memory read and written per parameter that the CPU updates.

        The gradient is written by the copy and read by the CPU, the state read and written in
        place, the new weight written (unless it is part of the state) and read by the copy.
        """
        weight_write = 0 if self.weight_is_master else self.weight
        return 2 * self.gradient + 2 * self.state + weight_write + self.weight

    @property
    def host_update(self) -> int:
        """Bytes that the CPU itself reads and writes per parameter it updates."""
        weight_write = 0 if self.weight_is_master else self.weight
        return self.gradient + 2 * self.state + weight_write

    @property
    def host_update_dram(self) -> int:
        """Bytes of host memory that the CPU's update moves per parameter; the gradient was there,
        and the copy engine reads the weight.
        """
        return self.host_dram - self.gradient - self.weight

    @property
    def upload_blocks(self) -> bool:
        """Whether the CPU waits while the weights that it made are copied up."""
        return False

    @property
    def resident_memory(self) -> int:
        """Bytes of device memory per resident parameter, its gradient included."""
        return self.staged_copy + self.gradient

    @property
    def host_memory(self) -> int:
        """Bytes of host memory per parameter that the CPU updates."""
        return self.state + self.gradient + (0 if self.weight_is_master else self.weight)

    @property
    def device_update(self) -> int:
        """Bytes that the device reads and writes per parameter it updates."""
        weight_write = 0 if self.weight_is_master else self.weight
        return self.gradient + 2 * self.state + weight_write


@dataclass(frozen=True, slots=True)
class Subgroup:
    """One slab as the performance model sees it: a number of elements and their footprint."""

    elements: int
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that optimizer state, gradients and staging slots of one rank may occupy.

    Attributes:
        device_bytes: On the device, beside weights and activations.
        host_bytes: In host memory, pinned.
    """

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class HiddenWindow:
    """Seconds of compute beside which copies and updates may run unseen.

    Attributes:
        backward: Of the backward pass, for updates that start before it ends.
        forward: Of the next forward pass, for updates that go on beside it.
        flush: Of the backward pass, for gradients on their way to the host; infinite means that
            they never hold anything up.
    """

    backward: float = 0.0
    forward: float = 0.0
    flush: float = math.inf

    @property
    def total(self) -> float:
        """Seconds of an update that nobody sees."""
        return self.backward + self.forward


NOTHING_HIDDEN = HiddenWindow()
"""Updates stand alone between backward and forward."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model expects of a schedule.

    Attributes:
        update_seconds: From the first to the last event of the update.
        exposed_seconds: The part that no compute hides.
        lane_seconds: Least time of each lane: `h2d`, `d2h`, `cpu`, `device`, `dram`, and `flush`
            for the gradients that backward does not hide.
        bound_by: The lane that needs longest.
    """

    update_seconds: float
    exposed_seconds: float
    lane_seconds: dict[str, float]
    bound_by: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """A home for every subgroup, in the order of the update, and what is expected of it.

    Attributes:
        strategy: `none`, `host`, `stride` or `optimal`.
        subgroups: What is updated, in order.
        homes: One home per subgroup.
        staging_slots: Sets of device buffers that staged subgroups pass through.
        prediction: Times that the performance model expects.
    """

    strategy: str
    subgroups: tuple[Subgroup, ...]
    homes: tuple[Home, ...]
    staging_slots: int
    prediction: Prediction

    def elements(self, home: Home) -> int:
        """Return how many parameters have this home."""
        return sum(
            subgroup.elements
            for subgroup, where in zip(self.subgroups, self.homes, strict=True)
            if where is home
        )
