"""The rank's side of its watcher: starts it, shows it a pulse, and leaves when it says so."""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import interlace
from interlace.trainer.exits import Exit
from interlace.trainer.heartbeat import Heartbeat, shared_memory
from interlace.trainer.watchdog.reports import alarms_of
from interlace.trainer.watchdog.watcher import (
    GOODBYE,
    LEAVE,
    LEAVES_WITHIN,
    REPORTS_WITHIN,
    Watched,
)

TELLS_WITHIN = 3 * REPORTS_WITHIN


class Watch:
    """One rank under the eyes of a watcher, until `close`.

    Args:
        run_dir: The run folder.
        attempt: Number of this start.
        rank: This rank.
        size: Number of ranks.
        seconds: Limit without progress; None for one that learns.
    """

    def __init__(
        self, run_dir: Path, attempt: int, rank: int, size: int, seconds: float | None
    ) -> None:
        self.watched = Watched(
            run_dir=str(run_dir),
            attempt=attempt,
            rank=rank,
            size=size,
            pid=os.getpid(),
            thread=threading.get_ident(),
            seconds=seconds,
            stalled_status=int(Exit.STALLED),
        )
        self.watched.folder.mkdir(parents=True, exist_ok=True)
        self.stacks = self.watched.stacks_path.open("ab")
        # Written by a handler in C, which needs no lock of the interpreter.
        faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
        self.crashes = not faulthandler.is_enabled()
        if self.crashes:
            faulthandler.enable(file=self.stacks)
        descriptor, memory = shared_memory()
        self.heartbeat = Heartbeat(memory)
        self.line, other = socket.socketpair()
        self.process = self._start(descriptor, other)
        os.close(descriptor)
        other.close()
        self.closing = False
        self.listener = threading.Thread(target=self._listen, name="watchdog", daemon=True)
        self.listener.start()

    def _start(self, descriptor: int, line: socket.socket) -> subprocess.Popen[bytes]:
        root = str(Path(interlace.__file__).absolute().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        # Nothing of site-packages is needed, and looking through it takes longer than the rest.
        command = [sys.executable, "-S", "-m", "interlace.trainer.watchdog"]
        return subprocess.Popen(
            [*command, json.dumps(asdict(self.watched)), str(descriptor), str(line.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor, line.fileno()),
        )

    def _listen(self) -> None:
        try:
            word = self.line.recv(len(LEAVE))
        except OSError:
            return
        if word == LEAVE:
            # The watcher has told and recorded everything; nothing here may be waited for.
            os._exit(Exit.STALLED)
        if not self.closing:
            print(
                f"interlace: the watcher of rank {self.watched.rank} has ended; training goes on, "
                "but if it stands still nobody will notice",
                file=sys.stderr,
            )

    def leave_if_stalled(self) -> None:
        """Wait to be told to leave, if the watchers of all ranks are about to end the run.

        A rank whose peer was ended first sees an error of communication; it ends for the reason
        that the watchers have found.
        """
        if any(alarm.decision() for alarm in alarms_of(self.watched.folder)):
            self.listener.join(TELLS_WITHIN)

    def close(self) -> None:
        """Say goodbye; the watcher ends."""
        self.closing = True
        # A watcher that has ended before is no reason to fail now.
        with contextlib.suppress(OSError):
            self.line.sendall(GOODBYE)
        try:
            self.process.wait(LEAVES_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join(LEAVES_WITHIN)
        self.line.close()
        faulthandler.unregister(signal.SIGUSR1)
        if self.crashes:
            faulthandler.disable()
        self.stacks.close()
        if self.watched.stacks_path.stat().st_size == 0:
            self.watched.stacks_path.unlink()
