"""How much memory the control groups of this process leave it.

Containers, Slurm and Kubernetes give a process less memory than the machine has, and the kernel
kills whoever takes more. Both versions of control groups say so in files; the limits of all groups
above the own one count as well. Pages of files that were read count as used, but the kernel drops
them before it kills anybody, so they are left out here.

The files: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class GroupMemory(NamedTuple):
    """Bytes that a control group may use, and that it uses now."""

    limit: int
    used: int


def group_memory(root: Path = ROOT, membership: Path = MEMBERSHIP) -> list[GroupMemory]:
    """Return the limits that this process is under, its own group's first; none outside groups.

    Args:
        root: Where control groups are mounted.
        membership: The kernel's file that names the groups of the process.
    """
    return [found for folder in group_folders(root, membership) if (found := memory_of(folder))]


def group_folders(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folder of the memory group and of all groups above it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base = root
        elif "memory" in controllers.split(","):
            base = root / "memory"
        else:
            continue
        # Inside a container the path may be that of the host; the mount then is the own group.
        folder = base / path.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent == base or base in parent.parents)


def memory_of(folder: Path) -> GroupMemory | None:
    """Return a group's limit and use; None where it has no limit or there is no such group."""
    for limit_name, used_name, cached_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = read_number(folder / limit_name), read_number(folder / used_name)
        if limit is not None and used is not None:
            return GroupMemory(limit, max(0, used - cached_bytes(folder, cached_name)))
    return None


def cached_bytes(folder: Path, name: str) -> int:
    """Return the bytes of files that the kernel would drop if memory were short."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def read_number(path: Path) -> int | None:
    """Return the number that a kernel file holds, or None if it has none."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
