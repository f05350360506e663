"""Ends what a launch has started and removes its folder, when the launch itself no longer can.

`python -S -m interlace.launch.launchers.ray.sweeper FOLDER` waits for the end of its input, which
the launching process holds open: it ends with it, also when that is killed. Ray's agents notice
the death of their parent late, or in a container not at all.
"""

import os
import shutil
import signal
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Wait, then end every process of the launch, and remove its folder."""
    sys.stdin.buffer.read()
    for pid in of_launch(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # It has ended meanwhile.
            continue
    shutil.rmtree(folder, ignore_errors=True)


def of_launch(folder: Path) -> list[int]:
    """Return the processes that have a file of the folder open, as all of Ray's do, for their logs,
    but for the launching one; none on systems without /proc.
    """
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [path.readlink() for path in (process / "fd").iterdir()]
        except OSError:
            # Another user's, or gone.
            continue
        if any(path.is_relative_to(folder) for path in opened):
            found.add(int(process.name))
    return sorted(found - {os.getpid(), os.getppid()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
