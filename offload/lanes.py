"""Lanes: what runs beside each other during an update, and how one piece of work waits for another.

Four lanes exist: `h2d` and `d2h` copy between host and device, `cpu` updates on the host, `device`
updates on the device. Work is submitted with the tickets it depends on and starts when they are
done; each lane does one piece at a time: of those that are ready the one that was submitted first.
A piece that fails fails everything that depends on it and nothing hangs.

Where there is a GPU the lanes `h2d`, `d2h` and `device` are CUDA streams: their threads only issue
work, order between them is kept by events, and no host thread waits for the device unless the CPU
needs a result. Without a GPU the same threads do the copies themselves, at a limited rate if asked
to, so that every line of scheduling runs in tests.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from interlace.offload.cores import CpuPool


class LaneError(RuntimeError):
    """A copy or an update failed; the cause is chained."""


@dataclass(eq=False)
class Ticket:
    """One piece of submitted work.

    Attributes:
        lane: Name of the lane that does it.
        what: For traces: `copy in`, `update`, `copy out`, `weights`, `gradient`.
        subgroup: For traces: number of the subgroup, or -1.
        bytes: For traces: what it moves (copies) or touches (updates).
        start: Seconds on `time.perf_counter`; on a CUDA stream the time of the issue.
        stop: Likewise.
    """

    lane: str
    what: str
    subgroup: int
    bytes: int
    start: float = 0.0
    stop: float = 0.0
    error: BaseException | None = None
    began: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None
    _settled: bool = False
    _followers: list[Callable[[], None]] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def settle(self, error: BaseException | None = None) -> None:
        """Mark the work as done, or failed, and wake who depends on it."""
        with self._changed:
            self.error = error
            self._settled = True
            followers, self._followers = self._followers, []
            self._changed.notify_all()
        for follower in followers:
            follower()

    def when_settled(self, follower: Callable[[], None]) -> None:
        """Call `follower` once the work is settled; at once if it is."""
        with self._changed:
            if not self._settled:
                self._followers.append(follower)
                return
        follower()

    def wait(self) -> None:
        """Block the calling thread until the work, on the device too, is complete.

        Raises:
            LaneError: It failed.
        """
        self.wait_issued()
        if self.ended is not None:
            self.ended.synchronize()

    def wait_issued(self) -> None:
        """Block until the work is settled; order on a CUDA device is left to events."""
        with self._changed:
            while not self._settled:
                self._changed.wait()
        if self.error is not None:
            raise LaneError(
                f"{self.what} of subgroup {self.subgroup} failed on lane {self.lane}: {self.error}"
            ) from self.error

    @property
    def complete(self) -> bool:
        """Whether the work is done, on the device too, and did not fail."""
        done = self._settled and self.error is None
        return done and (self.ended is None or self.ended.query())

    def wait_on_stream(self) -> None:
        """Let the current CUDA stream wait for the work; without a GPU, block."""
        self.wait_issued()
        if self.ended is not None:
            torch.cuda.current_stream(self.ended.device).wait_event(self.ended)


@dataclass(order=True)
class Piece:
    """Work that is ready; urgent work goes first, then what was submitted first."""

    patient: bool
    number: int
    ticket: Ticket = field(compare=False)
    work: Callable[[], None] = field(compare=False)
    after: Sequence[Ticket] = field(compare=False)
    completely: bool = field(compare=False)


class Lane:
    """One worker thread that does ready work in order."""

    def __init__(self, name: str, bytes_per_second: float | None = None) -> None:
        self.name = name
        self.bytes_per_second = bytes_per_second
        self._ready: list[Piece] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def submit(
        self,
        work: Callable[[], None],
        *,
        what: str,
        subgroup: int = -1,
        bytes: int = 0,
        after: Sequence[Ticket] = (),
        urgent: bool = False,
        completely: bool = False,
    ) -> Ticket:
        """Do `work` once all of `after` is settled; return its ticket at once.

        Args:
            work: Runs on the lane's thread.
            what: For traces.
            subgroup: For traces.
            bytes: For traces, and for a limited rate.
            after: What has to be done before.
            urgent: Go before all work that is not.
            completely: On a CUDA stream: settle with the work's end instead of its issue, so that
                what follows on other lanes does not stand in their streams before it could run, in
                the way of what can.
        """
        ticket = Ticket(self.name, what, subgroup, bytes)
        piece = Piece(not urgent, next(self._numbers), ticket, work, after, completely)
        remaining = [len(after)]
        guard = threading.Lock()

        def one_settled() -> None:
            with guard:
                remaining[0] -= 1
                if remaining[0]:
                    return
            self._enqueue(piece)

        if not after:
            self._enqueue(piece)
        for dependency in after:
            dependency.when_settled(one_settled)
        return ticket

    def close(self) -> None:
        """Let the thread end after the work that is ready; what comes later fails."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def _enqueue(self, piece: Piece) -> None:
        with self._wake:
            if not self._closed:
                heapq.heappush(self._ready, piece)
                self._wake.notify_all()
                return
        piece.ticket.settle(RuntimeError("the lane is closed"))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._ready and not self._closed:
                    self._wake.wait()
                if not self._ready:
                    return
                piece = heapq.heappop(self._ready)
            self._do(piece)
            # Waiting for the next piece must not keep the last one's tensors alive.
            del piece

    def _do(self, piece: Piece) -> None:
        ticket = piece.ticket
        try:
            for dependency in piece.after:
                self._follow(dependency)
            ticket.start = time.perf_counter()
            self._perform(piece)
            ticket.stop = time.perf_counter()
        except BaseException as error:
            ticket.settle(error)
        else:
            ticket.settle()

    def _follow(self, dependency: Ticket) -> None:
        """Wait for a settled dependency's work on the device; raise if it failed."""
        dependency.wait()

    def _perform(self, piece: Piece) -> None:
        piece.work()
        if self.bytes_per_second is not None:
            ticket = piece.ticket
            rest = ticket.start + ticket.bytes / self.bytes_per_second - time.perf_counter()
            if rest > 0:
                time.sleep(rest)


class StreamLane(Lane):
    """A lane whose work runs on a CUDA stream of its own; its thread only issues it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        super().__init__(name)

    def _follow(self, dependency: Ticket) -> None:
        dependency.wait_issued()
        if dependency.ended is not None:
            self.stream.wait_event(dependency.ended)

    def _perform(self, piece: Piece) -> None:
        ticket = piece.ticket
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            ticket.began = torch.cuda.Event(enable_timing=True)
            # Who waits for it on the host sleeps: its core belongs to updates.
            ended = torch.cuda.Event(enable_timing=True, blocking=True)
            ticket.began.record(self.stream)
            try:
                piece.work()
            finally:
                # Also what fails may have begun to copy.
                ended.record(self.stream)
                ticket.ended = ended
            if piece.completely:
                ended.synchronize()


@dataclass(frozen=True, kw_only=True)
class Throttle:
    """Rates of a simulated machine, in bytes per second; None leaves a lane as fast as it is."""

    h2d_bytes_per_second: float | None = None
    d2h_bytes_per_second: float | None = None
    cpu_bytes_per_second: float | None = None
    device_bytes_per_second: float | None = None


class Lanes:
    """The four lanes of one rank and the threads of its CPU lane.

    Args:
        device: Where the model's weights are.
        pool: Threads of the CPU lane.
        throttle: Rates of simulated copies; only without a GPU.
    """

    def __init__(
        self, device: torch.device, pool: CpuPool, throttle: Throttle | None = None
    ) -> None:
        self.device = device
        self.pool = pool
        rates = throttle or Throttle()
        self.cpu = Lane("cpu", rates.cpu_bytes_per_second)
        if device.type == "cuda":
            if throttle is not None:
                raise ValueError("a throttle simulates a device; here is a real one")
            self.h2d: Lane = StreamLane("h2d", device)
            self.d2h: Lane = StreamLane("d2h", device)
            self.compute: Lane = StreamLane("device", device)
        else:
            self.h2d = Lane("h2d", rates.h2d_bytes_per_second)
            self.d2h = Lane("d2h", rates.d2h_bytes_per_second)
            self.compute = Lane("device", rates.device_bytes_per_second)

    def current_work(self) -> Ticket:
        """Return a ticket for everything issued so far on the caller's CUDA stream."""
        ticket = Ticket("device", "compute", -1, 0)
        if self.device.type == "cuda":
            ticket.ended = torch.cuda.Event(enable_timing=True)
            ticket.ended.record(torch.cuda.current_stream(self.device))
        ticket.settle()
        return ticket

    def close(self) -> None:
        """End all threads, after the work that is ready; may be called again."""
        for lane in (self.cpu, self.h2d, self.d2h, self.compute):
            lane.close()
        self.pool.close()
