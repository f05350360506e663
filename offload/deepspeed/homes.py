"""Homes for the pieces of DeepSpeed's partitions, as the performance model gives them.

DeepSpeed sees a partition as one tensor, which is in one place: its pieces stay on the device all
together or not at all. The model knows of no such tie. Where its answer breaks one it is asked
again with room for nothing but staging slots, and a piece that it leaves on the device even so is
staged.
"""

from collections.abc import Sequence
from dataclasses import replace

from interlace.offload.deepspeed.flats import Flat
from interlace.offload.fit import memory_needs
from interlace.offload.performance_model import predict_homes
from interlace.offload.placement import Placement
from interlace.offload.schedule import Home, MemoryBudget, Subgroup


def choose(
    placement: Placement, flats: Sequence[Flat], held: MemoryBudget
) -> list[tuple[Home, ...]]:
    """Return the homes of all pieces of every partition.

    Args:
        placement: Knows machine and budget; its schedule is that of the homes afterwards.
        flats: The partitions, in the order of the update.
        held: Memory that state occupies already and that will be free again.

    Raises:
        MemoryShortage: State does not fit.
    """
    shapes = [piece.shape for flat in flats for piece in flat.pieces]
    allowed = placement.allowed(held)
    homes = by_flat(flats, placement.homes_of(shapes, allowed))
    if not any(torn(of_one) for of_one in homes):
        return homes
    slots = memory_needs(shapes, [Home.STAGED] * len(shapes), placement.options.staging_slots)
    room = min(slots.device_bytes, allowed.device_bytes)
    budget = MemoryBudget(room, allowed.host_bytes)
    return whole(placement, flats, placement.homes_of(shapes, budget))


def whole(
    placement: Placement, flats: Sequence[Flat], homes: Sequence[Home]
) -> list[tuple[Home, ...]]:
    """Return homes of all pieces with none on the device whose neighbours leave it."""
    placed = by_flat(flats, homes)
    mended = [staged(of_one) if torn(of_one) else of_one for of_one in placed]
    if mended != placed:
        predict(placement, [piece.shape for flat in flats for piece in flat.pieces], mended)
    return mended


def by_flat(flats: Sequence[Flat], homes: Sequence[Home]) -> list[tuple[Home, ...]]:
    """Return homes of all pieces partition by partition."""
    remaining = iter(homes)
    return [tuple(next(remaining) for _ in flat.pieces) for flat in flats]


def torn(homes: Sequence[Home]) -> bool:
    """Whether some pieces of a partition stay on the device and others do not."""
    return Home.RESIDENT in homes and set(homes) != {Home.RESIDENT}


def staged(homes: Sequence[Home]) -> tuple[Home, ...]:
    """Return homes with what was to stay on the device staged."""
    return tuple(Home.STAGED if home is Home.RESIDENT else home for home in homes)


def predict(
    placement: Placement, shapes: Sequence[Subgroup], homes: Sequence[Sequence[Home]]
) -> None:
    """Let the schedule of a placement be that of other homes."""
    if placement.schedule is None or placement.profile is None:
        return
    flat = tuple(home for of_one in homes for home in of_one)
    changed = replace(placement.schedule, subgroups=tuple(shapes), homes=flat)
    placement.schedule = predict_homes(placement.profile, changed, placement.options.hidden_window)
