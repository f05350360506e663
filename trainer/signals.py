"""Stopping on request: the first SIGTERM or SIGINT finishes the step, the second exits at once.

The handler only notes the signal. The loop asks at the end of every step, and all ranks agree on
the answer together with the loss, so that they leave after the same step with a committed
checkpoint. Whoever learns of the end in another way, such as a cluster's notice of preemption, says
so with `StopRequest.ask`. A notice has an end: what cannot be saved until then is not begun.

SIGTERM often comes by two ways at once: to every process of a service or a job, and again from the
launcher that hands it on. That is one request, not two.
"""

import math
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 3.0
"""A SIGTERM so soon after the first is the same one, by another way."""


class StopRequest:
    """Context manager that turns stop signals into a flag while it is open.

    Args:
        announce: Whether this rank tells a person.
        notice_seconds: How long the system waits after SIGTERM before it kills.
    """

    def __init__(self, announce: bool, notice_seconds: float = math.inf) -> None:
        self.announce = announce
        self.notice_seconds = notice_seconds
        self.signal: signal.Signals | None = None
        self.asked = 0.0
        self.reason = ""
        self.deadline = math.inf
        self.previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> bool:
        """Whether somebody asked to stop."""
        return bool(self.reason)

    @property
    def seconds_left(self) -> float:
        """Seconds until this process has to be gone; infinite where nobody set an end."""
        return self.deadline - time.monotonic()

    def ask(self, reason: str, seconds_left: float = math.inf) -> None:
        """Ask to stop after the present step; any thread may. Of several ends the first counts.

        Args:
            reason: A few words for a person, such as "the cluster takes this machine back".
            seconds_left: How long this process may still live.
        """
        first = not self.received
        self.deadline = min(self.deadline, time.monotonic() + seconds_left)
        self.reason = self.reason or reason
        if self.announce and first:
            self.tell(f"{reason}: finishing this step and saving")

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere the embedding program keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal() gave

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; leave at once on the second, unless it is an echo."""
        now = time.monotonic()
        if self.signal is not None:
            if number == self.signal == signal.SIGTERM and now < self.asked + ECHO_SECONDS:
                return
            os._exit(128 + number)
        self.signal, self.asked = signal.Signals(number), now
        # A person who types Ctrl-C waits.
        notice = self.notice_seconds if number == signal.SIGTERM else math.inf
        self.deadline = min(self.deadline, now + notice)
        self.reason = self.reason or self.signal.name
        if self.announce:
            self.tell(
                f"{self.signal.name}: finishing this step and saving; once more exits at once"
            )

    def tell(self, text: str) -> None:
        """Print a line; a handler may interrupt a write to the same stream, so to the descriptor
        itself.
        """
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
