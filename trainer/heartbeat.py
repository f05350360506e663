"""The pulse of one rank: which phase of which step it is in, in 48 bytes of shared memory.

A rank marks every phase that it enters with one call, which costs a few microseconds. Its watcher
(`interlace.trainer.watchdog`), a process of its own, maps the same memory and needs nothing from
the rank to read it: no lock, no interpreter, no disk. The memory has no name in any file system, so
nothing is left behind whoever is killed, and a storage that hangs does not stop the pulse.

Ranks mark the same phases in the same order, so the number of marks says how far a rank has come:
the one with the fewest is the one that others wait for. The same marks time what a rank does by
itself (`OwnTime`), which is how slow ranks are found.
"""

import mmap
import os
import struct
import tempfile
import time
from typing import NamedTuple

ORDINARY = frozenset(
    {"data", "forward", "backward", "exchange", "norm", "update", "diagnose", "observe"}
)
"""Phases of a usual step. All others (load, save, validate, ...) may take much longer."""

WAITS_FOR_ALL = "exchange"
"""The phase that no rank leaves before all ranks are in it, once in every step."""

_CLOCKS = {
    "data": time.perf_counter,
    "forward": time.thread_time,
    "backward": time.thread_time,
    "update": time.process_time,
}

_LAYOUT = struct.Struct("<QQqB15sQ")
PULSE_BYTES = _LAYOUT.size


class Pulse(NamedTuple):
    """What a rank has told last.

    Attributes:
        marks: Phases entered so far.
        beats: Signs of life, at least one for every mark.
        step: Step being done, from 1; 0 before the first.
        phase: Name of the phase.
        patient: Whether something long and legitimate may be under way, here or on another rank:
            compiling in the first two steps, or a slow phase since the last exchange.
    """

    marks: int
    beats: int
    step: int
    phase: str
    patient: bool


class OwnTime:
    """Seconds that a rank spends on its own work, waits for other ranks left out.

    In forward and backward a sharded model waits for other ranks at every layer, and the time on
    the wall is the same on all of them. There the processor time of the training thread counts,
    which stands still while the thread waits; on a GPU, whose kernels wait unseen, it is the time
    to launch them. In an update it is the processor time of all threads, so that neighbours who
    keep the cores busy are not taken for work. Fetching data waits for no rank, but for disks: its
    time on the wall counts.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.phase = ""
        self.entered = 0.0

    def enter(self, phase: str) -> None:
        """Close the phase before and open this one."""
        clock = _CLOCKS.get(self.phase)
        if clock is not None:
            self.seconds += clock() - self.entered
        clock = _CLOCKS.get(phase)
        self.phase, self.entered = phase, clock() if clock is not None else 0.0

    def take(self) -> float:
        """Return the seconds since the last call, and count from 0 again."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Heartbeat:
    """Where a rank says what it is about to do.

    Args:
        memory: Where others read it; None where nobody does.
    """

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory: mmap.mmap | bytearray = memory or bytearray(PULSE_BYTES)
        self.pulse = Pulse(marks=0, beats=0, step=0, phase="start", patient=True)
        self.exchanges = 0
        self.own = OwnTime()
        self._write(self.pulse)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Mark the beginning of a phase.

        Args:
            phase: Up to 15 ASCII letters.
            step: The step it belongs to, from 1; unset means the one before.
        """
        before = self.pulse
        patient = before.patient
        if before.phase == WAITS_FOR_ALL:
            self.exchanges += 1
            # Up to the second exchange something may still be compiled.
            patient = self.exchanges < 2
        self._write(
            Pulse(
                marks=before.marks + 1,
                beats=before.beats + 1,
                step=before.step if step is None else step,
                phase=phase,
                patient=patient or phase not in ORDINARY,
            )
        )
        self.own.enter(phase)

    def beat(self) -> None:
        """Tell that a long phase is getting on."""
        old = self.pulse
        self._write(Pulse(old.marks, old.beats + 1, old.step, old.phase, old.patient))

    def _write(self, pulse: Pulse) -> None:
        self.pulse = pulse
        name = pulse.phase.encode("ascii")
        # The count stands at both ends: a reader that finds two different ones reads again.
        _LAYOUT.pack_into(
            self.memory, 0, pulse.beats, pulse.marks, pulse.step, pulse.patient, name, pulse.beats
        )


def read_pulse(memory: mmap.mmap | bytearray) -> Pulse:
    """Return what a rank has told last; may be called from another process at any time."""
    while True:
        beats, marks, step, patient, name, again = _LAYOUT.unpack_from(memory, 0)
        # A rank that was killed within its mark leaves two counts; then it ends all the same.
        if beats == again or _LAYOUT.unpack_from(memory, 0)[0] == beats:
            break
    return Pulse(marks, beats, step, name.rstrip(b"\0").decode("ascii", "replace"), bool(patient))


def shared_memory() -> tuple[int, mmap.mmap]:
    """Return a descriptor to hand to another process, and the memory behind it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("interlace-heartbeat")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, PULSE_BYTES)
    return descriptor, mmap.mmap(descriptor, PULSE_BYTES)
