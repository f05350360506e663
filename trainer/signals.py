"""Stopping on request: the first SIGTERM or SIGINT finishes the step, the second exits at once.

The handler only notes the signal. The loop asks at the end of every step, and all ranks agree on
the answer together with the loss, so that they leave after the same step with a committed
checkpoint.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns stop signals into a flag while it is open."""

    def __init__(self, announce: bool) -> None:
        self.announce = announce
        self.signal: signal.Signals | None = None
        self.previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> bool:
        """Whether a stop signal has come."""
        return self.signal is not None

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
        """Note the first signal; leave at once on the second."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self.announce:
            name = self.signal.name
            # A handler may interrupt a write to the same stream: write to the descriptor itself.
            os.write(
                sys.stderr.fileno(),
                f"\n{name}: finishing this step and saving; once more exits at once\n".encode(),
            )
