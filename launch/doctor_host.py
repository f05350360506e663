"""What `interlace doctor` says of a machine's cores and of what others on it could read or change.

Both are looked at, never changed. Cores are told as `interlace.offload.cores` divides them among
ranks; what is told of safety are departures from how the program leaves things by itself.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from interlace.offload.cores import divided, parse_core_list, usable_cores

FLOORS = {
    "torch": (2, 10, "files of weights could run code when they were loaded (CVE-2026-24747)"),
    "transformers": (5, 3, "a model's config.json alone could run code (CVE-2026-4372)"),
    "ray": (2, 52, "a cluster has no token, and lets anybody run code (CVE-2023-48022)"),
}
"""Oldest versions, as major and minor number, and what is wrong with older ones."""

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Cores:
    """The cores of this machine.

    Attributes:
        usable: How many this process may use.
        numa_nodes: Cores of every NUMA node, as far as they are usable; empty if unknown.
        shares: For a number of ranks, the cores that each would have.
        threads: Value of OMP_NUM_THREADS; None if it is not set.
    """

    usable: int
    numa_nodes: tuple[int, ...]
    shares: Mapping[int, tuple[int, ...]]
    threads: str | None

    @property
    def warning(self) -> str | None:
        """What is wrong with OMP_NUM_THREADS, and what to do."""
        if self.threads is None or not self.threads.isdecimal():
            return None
        few = [ranks for ranks, share in self.shares.items() if int(self.threads) < min(share)]
        if not few:
            return None
        each = min(self.shares[few[0]])
        return (
            f"OMP_NUM_THREADS={self.threads}: with {counted(few[0], 'rank')} on this machine, "
            f"{each - int(self.threads)} of the {each} cores of each idle while torch computes on "
            "the CPU (updates on the host use them all); type  unset OMP_NUM_THREADS , and start "
            "ranks with `interlace launch`, which gives each its share"
        )


def cores_here() -> Cores:
    """Look at this machine's cores."""
    usable = usable_cores()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", 0) if gpus else None
    counts = sorted({1, 2, *([gpus] if gpus else [4])})
    shares = {
        ranks: tuple(len(divided(usable, ranks, rank, device)) for rank in range(ranks))
        for ranks in counts
        if ranks <= len(usable)
    }
    nodes = [
        len(usable & parse_core_list((node / "cpulist").read_text(encoding="ascii")))
        for node in sorted(NODES.glob("node[0-9]*"))
    ]
    return Cores(len(usable), tuple(nodes), shares, os.environ.get("OMP_NUM_THREADS"))


def core_lines(cores: Cores) -> list[tuple[str, str]]:
    """Return labels and texts about cores."""
    nodes = cores.numa_nodes
    where = f", on {counted(len(nodes), 'NUMA node')}" if nodes else ""
    if len(nodes) > 1:
        where += f" ({' + '.join(map(str, nodes))})"
    lines = [("cores", f"{cores.usable} usable{where}")]
    for ranks, share in cores.shares.items():
        label = "share of a rank" if ranks == 1 else ""
        least, most = min(share), max(share)
        size = str(most) if least == most else f"{least} to {most}"
        lines.append((label, f"{counted(ranks, 'rank')} on this machine: {size}"))
    if cores.warning:
        lines.append(("threads", cores.warning))
    return lines


def warnings_here(folder: Path) -> list[str]:
    """Return what others on this machine could read or change, and what to type against it.

    Args:
        folder: Where runs lie under `runs`.
    """
    return [
        *old_libraries(),
        *open_folders(folder / "runs"),
        *open_ray(),
        *(
            ["this is root: a mistake reaches everything; train as a user of its own where you can"]
            if hasattr(os, "getuid") and os.getuid() == 0
            else []
        ),
    ]


def old_libraries() -> list[str]:
    """Return which installed libraries have known holes."""
    found: list[str] = []
    for name, (major, minor, what) in FLOORS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        # A release candidate, `5.0rc1`, counts as its release.
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is not None and (int(numbers[1]), int(numbers[2])) < (major, minor):
            found.append(f"{name} {version}: {what}; type  pip install '{name}>={major}.{minor}'")
    return found


def open_folders(runs: Path) -> list[str]:
    """Return which run folders others may enter."""
    if not runs.is_dir():
        return []
    wide = [run.name for run in sorted(runs.iterdir()) if run.is_dir() and open_to_others(run)]
    if not wide:
        return []
    shown = ", ".join(wide[:3]) + (f" and {len(wide) - 3} more" if len(wide) > 3 else "")
    return [f"others may enter run folders: {shown}; type  chmod -R go= {runs}/*"]


def open_ray() -> list[str]:
    """Return what lets others into Ray clusters of this user."""
    if find_spec("ray") is None:
        return []
    found: list[str] = []
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        found.append(
            "RAY_AUTH_MODE=disabled: whoever reaches a Ray cluster runs code there as you; type  "
            "unset RAY_AUTH_MODE"
        )
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.is_file() and open_to_others(token):
        found.append(f"others may read the token of your Ray clusters; type  chmod 600 {token}")
    for folder in {Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"}:
        if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
            found.append(
                f"every user may write to {folder}, where Ray keeps logs and sockets unless it is "
                f"told otherwise; `interlace launch ray` has a folder of its own, for others type  "
                f"chmod 700 {folder}"
            )
    return found


def open_to_others(path: Path) -> bool:
    """Whether users other than the owner may do anything with a file or folder."""
    return bool(path.stat().st_mode & 0o077)


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
