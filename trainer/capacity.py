"""Memory of one rank by kind, and whether the machine has it.

Kinds on the device: weights, activations and gathered layers, which offloading does not change, and
the part of the optimizer's state that stays there. Kinds on the host: the rest of that state. A
shortage says what is needed, what there is and which settings help; on a CPU the device's memory is
the host's, and both are counted together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, computed_field

from interlace.offload.hardware import HardwareProfile
from interlace.offload.memory import HOST_SHARE
from interlace.offload.schedule import Home, Subgroup
from interlace.trainer.observe.units import human_bytes

GIB = 2**30
DEVICE_RESERVE = 0.06
"""Share of device memory that nobody plans with: fragments, workspaces, the context."""


class DeviceMemory(BaseModel):
    """Bytes of one rank on the device at the peak of a step.

    Attributes:
        weights: In the compute dtype.
        activations: What forward keeps for backward.
        gathered_weights: Whole layers, where weights are sharded.
        engine_buffers: Gradients and buckets that the engine holds itself.
        master_weights: Masters of resident subgroups, less what the weights are themselves.
        moments: Moments of resident subgroups.
        gradients: Gradients of resident and staged subgroups.
        staging_slots: Buffers that staged subgroups pass through.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: int = 0
    activations: int = 0
    gathered_weights: int = 0
    engine_buffers: int = 0
    master_weights: int = 0
    moments: int = 0
    gradients: int = 0
    staging_slots: int = 0

    @computed_field
    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.fixed + self.state

    @property
    def fixed(self) -> int:
        """What offloading does not change."""
        return self.weights + self.activations + self.gathered_weights + self.engine_buffers

    @property
    def state(self) -> int:
        """State, gradients and staging slots."""
        return self.master_weights + self.moments + self.gradients + self.staging_slots


class HostMemory(BaseModel):
    """Bytes of one rank's optimizer state on the host.

    Attributes:
        engine_buffers: Gradients and weights that the engine holds itself.
        master_weights: Masters of staged and host subgroups.
        moments: Moments of staged and host subgroups.
        gradients: Gradients of host subgroups, and of staged ones where they arrive with the state.
        new_weights: Weights of host subgroups on their way to the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine_buffers: int = 0
    master_weights: int = 0
    moments: int = 0
    gradients: int = 0
    new_weights: int = 0

    @computed_field
    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.engine_buffers + self.state

    @property
    def state(self) -> int:
        """State, gradients and new weights."""
        return self.master_weights + self.moments + self.gradients + self.new_weights


class Memory(BaseModel):
    """Bytes of one rank by kind, at the peak of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: DeviceMemory
    host: HostMemory


@dataclass(frozen=True)
class Room:
    """The memory that one rank may fill.

    Attributes:
        device_bytes: On the device, less a reserve.
        host_bytes: Of the host, this rank's share; on a CPU device and host together.
        shared: Whether the device's memory is the host's.
    """

    device_bytes: int
    host_bytes: int
    shared: bool

    @property
    def device_words(self) -> str:
        """What memory of the device is called."""
        return "host" if self.shared else "device"


def room_of(hardware: HardwareProfile, device_type: str, ranks_per_host: int) -> Room:
    """Return what one rank may fill."""
    host = int(HOST_SHARE * hardware.host_memory_bytes / ranks_per_host)
    if device_type != "cuda":
        return Room(host, host, shared=True)
    return Room(int((1 - DEVICE_RESERVE) * hardware.device_memory_bytes), host, shared=False)


def memory_by_kind(
    fixed: Memory,
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    slots: int,
    moment_bytes: int,
) -> Memory:
    """Return the memory of one rank.

    Args:
        fixed: What offloading does not change: weights, activations, buffers.
        subgroups: The rank's subgroups.
        homes: Their homes.
        slots: Staging slots.
        moment_bytes: Of all moments of one parameter.
    """
    device = {"master_weights": 0, "moments": 0, "gradients": 0}
    host = {"master_weights": 0, "moments": 0, "gradients": 0, "new_weights": 0}
    slot = 0
    for subgroup, home in zip(subgroups, homes, strict=True):
        size, footprint = subgroup.elements, subgroup.footprint
        state = device if home is Home.RESIDENT else host
        kept = footprint.state if home is Home.HOST else footprint.staged_copy
        state["master_weights"] += size * (kept - moment_bytes)
        state["moments"] += size * moment_bytes
        with_state = home is Home.HOST or footprint.gradient_with_state
        (state if with_state else device)["gradients"] += size * footprint.gradient
        if home is Home.HOST and not footprint.weight_is_master:
            host["new_weights"] += size * footprint.weight
        if home is Home.STAGED:
            slot = max(slot, size * footprint.copied_in)
    return Memory(
        device=fixed.device.model_copy(update={**device, "staging_slots": slots * slot}),
        host=fixed.host.model_copy(update=host),
    )


@dataclass(frozen=True)
class Shortage:
    """Why something does not fit.

    Attributes:
        short: A few words, for a row of a table.
        long: What is needed, what there is and what to type.
    """

    short: str
    long: str


@dataclass(frozen=True)
class Demand:
    """One strategy's memory and what may be changed to lower it.

    Attributes:
        strategy: `none`, `host`, `stride` or `optimal`.
        memory: What it needs.
        device_budget: Device memory that the recipe allows state, or None.
        host_budget: Likewise of the host.
        microbatch_rows: Rows of one pass.
        checkpointing: What backward recomputes.
        halves_moments: Whether moments might be kept in half the bytes.
        more_ranks: What lets more ranks share the weights.
    """

    strategy: str
    memory: Memory
    device_budget: int | None
    host_budget: int | None
    microbatch_rows: int
    checkpointing: str
    halves_moments: bool
    more_ranks: str


def shortage_of(demand: Demand, room: Room) -> Shortage | None:
    """Return what is missing, or None where everything fits."""
    device, host = demand.memory.device, demand.memory.host
    needs_device = device.total + (host.total if room.shared else 0)
    found: list[Shortage] = []
    if needs_device > room.device_bytes:
        found.append(device_shortage(demand, room, needs_device))
    elif demand.device_budget is not None and device.state > demand.device_budget:
        found.append(budget_shortage(demand, "device", device.state, demand.device_budget))
    if not room.shared and host.total > room.host_bytes:
        found.append(host_shortage(demand, room))
    elif demand.host_budget is not None and host.state > demand.host_budget:
        found.append(budget_shortage(demand, "host", host.state, demand.host_budget))
    if not found:
        return None
    long = "\n".join(each.long for each in found)
    return Shortage("needs " + "; ".join(each.short for each in found), long)


def few_words(needs: int, where: str, verb: str, there: int) -> str:
    """Return `61.2 GiB device, has 30.1`: the unit stands once where it is the same."""
    number, unit = human_bytes(needs).split()
    has, its_unit = human_bytes(there).split()
    return f"{number} {unit} {where}, {verb} {has}{'' if its_unit == unit else f' {its_unit}'}"


def device_shortage(demand: Demand, room: Room, needs: int) -> Shortage:
    """Word a device that is too small."""
    device = demand.memory.device
    where = room.device_words
    kinds = [
        f"{human_bytes(size)} {name.replace('_', ' ')}"
        for name, size in parts(demand, room)
        if size
    ]
    remedies: list[str] = []
    if demand.strategy == "none" and device.fixed < room.device_bytes and not room.shared:
        remedies.append("offload.strategy=optimal")
    elif demand.device_budget is not None and device.fixed < room.device_bytes:
        left = (room.device_bytes - device.fixed) / GIB
        remedies.append(f"offload.device_budget_gib={floor_digits(left)}")
    # Fewer activations cannot make room for weights that fill the device alone.
    if device.fixed - device.activations < room.device_bytes:
        if demand.checkpointing != "block":
            remedies.append("train.activation_checkpointing=block")
        if demand.microbatch_rows > 1:
            remedies.append(f"train.microbatch_rows={demand.microbatch_rows // 2}")
    remedies.append(demand.more_ranks)
    return Shortage(
        few_words(needs, where, "has", room.device_bytes),
        f"offload.strategy={demand.strategy}: needs {human_bytes(needs)} of {where} memory "
        f"({', '.join(kinds)}), and there are {human_bytes(room.device_bytes)} per rank, reserves "
        f"left out; type {', or '.join(remedies)}",
    )


def parts(demand: Demand, room: Room) -> list[tuple[str, int]]:
    """Return the kinds of memory that a shortage names."""
    device, host = demand.memory.device, demand.memory.host
    named = [
        ("weights", device.weights),
        ("activations", device.activations),
        ("gathered weights", device.gathered_weights),
        ("engine buffers", device.engine_buffers),
        ("optimizer state", device.state),
    ]
    return [*named, ("state on the host", host.total)] if room.shared else named


def host_shortage(demand: Demand, room: Room) -> Shortage:
    """Word a host that is too small."""
    needs = demand.memory.host.total
    remedies = ["offload.strategy=optimal"] if demand.strategy in {"host", "stride"} else []
    if demand.halves_moments:
        remedies.append("offload.moments=bfloat16")
    remedies.append("ranks on more hosts")
    return Shortage(
        few_words(needs, "host", "has", room.host_bytes),
        f"offload.strategy={demand.strategy}: needs {human_bytes(needs)} of host memory for "
        f"optimizer state, and there are {human_bytes(room.host_bytes)} per rank, reserves left "
        f"out; type {', or '.join(remedies)}",
    )


def budget_shortage(demand: Demand, key: str, needs: int, budget: int) -> Shortage:
    """Word a budget of the recipe that is too small for the strategy."""
    higher = f"offload.{key}_budget_gib={ceil_digits(needs / GIB)}"
    other = {"device": "host", "host": "optimal"}[key]
    also = f", or offload.strategy={other}" if demand.strategy != other else ""
    return Shortage(
        few_words(needs, f"{key} for state", "may have", budget),
        f"offload.strategy={demand.strategy}: optimizer state needs {human_bytes(needs)} of {key} "
        f"memory, and offload.{key}_budget_gib allows {human_bytes(budget)}; type {higher}{also}",
    )


def budget_problems(device_gib: float | None, host_gib: float | None, room: Room) -> list[str]:
    """Return what is wrong with budgets that exceed the machine's memory."""
    found: list[str] = []
    for key, asked, there, where in (
        ("device", device_gib, room.device_bytes, room.device_words),
        ("host", host_gib, room.host_bytes, "host"),
    ):
        if asked is not None and asked * GIB > there:
            found.append(
                f"offload.{key}_budget_gib={asked:.10g}: a rank may fill {human_bytes(there)} of "
                f"{where} memory on this machine; type offload.{key}_budget_gib=none for what is "
                f"left of it, or {floor_digits(there / GIB)} at most"
            )
    return found


def floor_digits(gib: float) -> str:
    """Return a size in GiB, rounded down to be typed."""
    digits = 1 if gib >= 1 else 5
    return f"{int(gib * 10**digits) / 10**digits:g}"


def ceil_digits(gib: float) -> str:
    """Return a size in GiB, rounded up to be typed."""
    digits = 1 if gib >= 1 else 5
    return f"{math.ceil(gib * 10**digits) / 10**digits:g}"
