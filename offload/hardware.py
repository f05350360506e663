"""What a machine can do: memory sizes, the peak rate of matrix products, copy and update rates.

The rate is the denominator of MFU. For well-known GPUs it is the vendor's dense bf16 figure; on a
CPU, and on GPUs that the table does not know, it is measured here, so that MFU means "share of the
best matrix product this machine showed". Memory sizes come from the driver and the kernel; nothing
runs at import.
"""

import difflib
import os
import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from interlace.offload.control_group import group_memory

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 matrix FLOP/s by a part of the device name, from the vendor's data sheets; the longest
matching name counts."""


MACHINES = Path(__file__).parent / "machines"
"""Profiles of known machines, one JSON file each."""

PLAUSIBLE = {
    "matmul_flops": (1e6, 1e19),
    "memory_bytes": (2**20, 2**50),
    "per_second": (1e3, 1e16),
    "overhead_seconds": (0.0, 3600.0),
}
"""Bounds of the figures of a profile by the end of their names, wide enough for any machine."""


class OffloadRates(BaseModel):
    """How fast one rank copies and updates, and what the ranks of a node share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks_per_node: PositiveInt = 1
    """Ranks that share the node's host memory, each with its own device and copy engines."""

    h2d_bytes_per_second: PositiveFloat
    """Copies to the device from pinned memory, one rank alone."""

    d2h_bytes_per_second: PositiveFloat
    """Copies to the host into pinned memory, one rank alone."""

    duplex_efficiency: Annotated[float, Field(gt=0.5, le=1.0)] = 1.0
    """Rate of each direction while both are busy, as a share of its rate alone."""

    pageable_bytes_per_second: PositiveFloat
    """Copies from or to memory that is not pinned; only the published systems use them."""

    cpu_update_bytes_per_second: PositiveFloat
    """One-pass update on one rank's share of the node's cores, in bytes read and written."""

    cpu_cast_elements_per_second: PositiveFloat
    """A cast on one thread, as in a blocking copy that changes the type."""

    device_update_bytes_per_second: PositiveFloat
    """Update on the device, in bytes read and written."""

    piece_overhead_seconds: NonNegativeFloat = 0.0
    """Time that every copy and every update takes beside its bytes: hand-over, launch, events."""

    host_dram_bytes_per_second: PositiveFloat
    """Host memory of the whole node, reads and writes together, as a STREAM-like loop sees it."""

    collective_bytes_per_second: PositiveFloat
    """All-gather and reduce-scatter inside a node, per rank, in bytes that the rank receives."""

    network_bytes_per_second: PositiveFloat
    """The same between nodes, per rank."""

    attainable_flops_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the peak matrix rate that training reaches while it computes."""


class HardwareProfile(BaseModel):
    """One rank's share of a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_name: str
    """Model name of the accelerator, or `CPU`."""

    matmul_flops: PositiveFloat
    """Peak FLOP/s of a matrix product in the compute dtype."""

    device_memory_bytes: PositiveInt
    """Memory of the accelerator; the host's own where there is none."""

    host_memory_bytes: PositiveInt
    """Physical memory of the host."""

    name: str = ""
    """Name of a known machine, or of the host it was measured on."""

    sources: dict[str, str] = {}
    """Where each figure comes from."""

    measurements: dict[str, dict[str, float]] = {}
    """Single figures behind the rates, as `interlace profile` took them."""

    rates: OffloadRates | None = None
    """Copy and update rates; None until they are measured."""


def with_active_ranks(profile: HardwareProfile, ranks: int) -> HardwareProfile:
    """Return what a profile means when so many ranks of its node work: they share memory and cores,
    and fewer ranks get more of both.
    """
    rates = profile.rates
    if rates is None or ranks == rates.ranks_per_node:
        return profile
    node = rates.cpu_update_bytes_per_second * rates.ranks_per_node
    # One rank alone does not keep more cores busy than half a node; memory bounds it as well.
    share = min(node / ranks, 0.5 * node) if rates.ranks_per_node > 1 else node / ranks
    changes = {"ranks_per_node": ranks, "cpu_update_bytes_per_second": share}
    corrected = OffloadRates.model_validate(rates.model_dump() | changes)
    return profile.model_copy(update={"rates": corrected})


def known_machines() -> list[str]:
    """Return the names of the profiles that ship."""
    return sorted(path.stem for path in MACHINES.glob("*.json"))


def load_profile(name: str) -> HardwareProfile:
    """Return the profile of a known machine, or of a JSON file that `interlace profile` wrote.

    Raises:
        ValueError: There is no such machine or file, or the file is not a profile.
    """
    path = Path(name) if name.endswith(".json") else MACHINES / f"{name}.json"
    known = known_machines()
    if not path.is_file():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"hardware {name}: is neither a known machine ({', '.join(known)}) nor a JSON file "
            f"that `interlace profile` wrote{hint}"
        )
    try:
        profile = HardwareProfile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"hardware {name}: is not a profile: {where}: {first['msg']}; "
            "measure one with `interlace profile`"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"hardware {name}: is not a profile: byte {error.start} is not UTF-8 text; "
            "measure one with `interlace profile`"
        ) from error
    except OSError as error:
        raise ValueError(f"hardware {name}: cannot be read: {error.strerror}") from error
    strange = implausible(profile)
    if strange is not None:
        raise ValueError(f"hardware {name}: {strange}; measure one with `interlace profile`")
    return profile


def implausible(profile: HardwareProfile) -> str | None:
    """Return the first figure that no machine has, with the bounds that it breaks, or None."""
    figures: dict[str, float] = {
        "matmul_flops": profile.matmul_flops,
        "device_memory_bytes": profile.device_memory_bytes,
        "host_memory_bytes": profile.host_memory_bytes,
    }
    if profile.rates is not None:
        figures |= {f"rates.{key}": value for key, value in profile.rates}
    for key, value in figures.items():
        low, high = next((pair for end, pair in PLAUSIBLE.items() if key.endswith(end)), (0, 1e6))
        if not low <= value <= high:
            return f"{key}={value:g} is no figure of a machine (from {low:g} to {high:g})"
    return None


def profile_hardware(device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    """Look at (and, where no figure is published, measure) one device; takes less than a second."""
    host = host_memory_bytes()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = [name for name in PEAK_BF16_FLOPS if name in properties.name]
        published = (
            PEAK_BF16_FLOPS[max(known, key=len)] if known and dtype is torch.bfloat16 else None
        )
        rate = published or measure_matmul_flops(device, dtype)
        return HardwareProfile(
            device_name=properties.name,
            matmul_flops=rate,
            device_memory_bytes=properties.total_memory,
            host_memory_bytes=host,
        )
    return HardwareProfile(
        device_name="CPU",
        matmul_flops=measure_matmul_flops(device, dtype),
        device_memory_bytes=host,
        host_memory_bytes=host,
    )


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, trials: int = 20) -> float:
    """Return the best FLOP/s of `trials` square matrix products."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(trials + 1):  # the first one warms up and never wins
        start = time.perf_counter()
        torch.matmul(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def host_memory_bytes() -> int:
    """Return the memory of this host in bytes: the physical one, or what control groups grant."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(group.limit for group in group_memory())])


def resident_bytes() -> int:
    """Return the host memory this process occupies now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
