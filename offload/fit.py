"""Whether homes fit into memory: what they need, what there is, and which setting helps if not."""

from collections.abc import Sequence

from interlace.offload.schedule import Footprint, Home, MemoryBudget, MemoryShortage, Subgroup


def device_bytes(footprint: Footprint, home: Home) -> int:
    """Return the device memory of one parameter's state and gradient."""
    staged = 0 if footprint.gradient_with_state else footprint.gradient
    kept = {Home.RESIDENT: footprint.resident_memory, Home.STAGED: staged}
    return kept.get(home, 0)


def host_bytes(footprint: Footprint, home: Home) -> int:
    """Return the host memory of one parameter's state and gradient."""
    kept = {Home.HOST: footprint.host_memory, Home.STAGED: footprint.copied_in}
    return kept.get(home, 0)


def memory_needs(subgroups: Sequence[Subgroup], homes: Sequence[Home], slots: int) -> MemoryBudget:
    """Return the memory that state, gradients and staging slots of these homes occupy."""
    device = host = slot = 0
    for subgroup, home in zip(subgroups, homes, strict=True):
        device += subgroup.elements * device_bytes(subgroup.footprint, home)
        host += subgroup.elements * host_bytes(subgroup.footprint, home)
        if home is Home.STAGED:
            slot = max(slot, subgroup.elements * subgroup.footprint.copied_in)
    return MemoryBudget(device + slots * slot, host)


def fits(needs: MemoryBudget, memory: MemoryBudget) -> bool:
    """Whether needs stay within a budget."""
    return needs.device_bytes <= memory.device_bytes and needs.host_bytes <= memory.host_bytes


def check_memory(
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    memory: MemoryBudget,
    slots: int,
    strategy: str,
) -> None:
    """Raise `MemoryShortage` unless homes fit the memory."""
    if not fits(memory_needs(subgroups, homes, slots), memory):
        raise shortage(subgroups, homes, memory, slots, strategy)


def shortage(
    subgroups: Sequence[Subgroup],
    homes: Sequence[Home],
    memory: MemoryBudget,
    slots: int,
    strategy: str,
) -> MemoryShortage:
    """Return the error: what is needed, what is there, which setting helps."""
    needs = memory_needs(subgroups, homes, slots)
    lines: list[str] = []
    if needs.device_bytes > memory.device_bytes:
        lines.append(
            f"optimizer state needs {gib(needs.device_bytes)} of device memory and may have "
            f"{gib(memory.device_bytes)}; set offload.device_budget_gib higher, "
            "offload.strategy=optimal or host, or smaller offload.subgroup_elements"
        )
    if needs.host_bytes > memory.host_bytes:
        lines.append(
            f"optimizer state needs {gib(needs.host_bytes)} of host memory and may have "
            f"{gib(memory.host_bytes)}; set offload.host_budget_gib higher, "
            "offload.moments=bfloat16, offload.device_budget_gib higher (what is resident leaves "
            "the host), or spread the model over more ranks"
        )
    return MemoryShortage(f"offload.strategy={strategy}: " + "\n".join(lines))


def gib(size: int) -> str:
    """Return a size in GiB, or in MiB where it is small."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
