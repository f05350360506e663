"""One node of a private Ray cluster inside a Slurm job.

The first node starts the head and the run, which ends the cluster when it ends; the others join.
Ray's own folder is ours alone, and nobody is let in without the job's token. `ray stop` is not
called: it ends every Ray of this user on the machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from interlace.launch.launchers.supervising import Stop, ended

HEAD_SECONDS = 300.0
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def main(words: Sequence[str]) -> int:
    """Be this node; `words` are the head's address and what `interlace launch ray` takes."""
    address, *run = words
    host, _, port = address.rpartition(":")
    folder = private_folder()
    if int(os.environ["SLURM_PROCID"]) > 0:
        # A signal is for the ranks: it reaches them from the first node, through Ray.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for(host, int(port))
        join = [*RAY, "start", f"--address={address}", "--block", "--disable-usage-stats"]
        try:
            return ended(subprocess.run(join, check=False, stdout=subprocess.DEVNULL).returncode)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    start = [
        *RAY,
        "start",
        "--head",
        f"--port={port}",
        # Ray opens its own folder to everybody; the one around it stays shut.
        f"--temp-dir={folder / 'ray'}",
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--block",
    ]
    # What it says there is advice to people at a terminal.
    head = subprocess.Popen(start, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(host, int(port))
        launcher = [sys.executable, "-m", "interlace.launch.cli", "launch", "ray"]
        with Stop() as stop:
            stop.process = subprocess.Popen([*launcher, *run, "--address", address])
            return ended(stop.process.wait())
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def private_folder() -> Path:
    """Return a folder of this node, new and ours alone, in which Ray's lies; its path is short,
    since sockets lie there.

    Raises:
        PermissionError: Somebody else has made it.
    """
    folder = Path(f"/tmp/interlace-{os.getuid()}-{os.environ['SLURM_JOB_ID']}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(f"{folder} is not ours alone; somebody else has made it")
    return folder


def wait_for(host: str, port: int) -> None:
    """Wait until the head answers.

    Raises:
        TimeoutError: It does not.
    """
    end = time.monotonic() + HEAD_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"no head of Ray at {host}:{port} within {HEAD_SECONDS:.0f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
