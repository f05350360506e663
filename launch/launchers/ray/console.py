"""What rank 0 prints, line by line over the bridge into the launching terminal."""

import io
import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

LINE_SECONDS = 0.1
"""How long printed lines are collected before they are sent together."""

Send = Callable[[Sequence[str]], None]


class Forwarded(io.TextIOBase):
    """A text stream whose lines are sent, and written where they went before.

    Args:
        send: Sends lines; may wait.
        beneath: Where they went before.
    """

    def __init__(self, send: Send, beneath: TextIO) -> None:
        self.send = send
        self.beneath = beneath
        self.rest = ""
        self.lock = threading.Lock()
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.thread = threading.Thread(target=self.work, daemon=True, name="console")
        self.thread.start()

    def write(self, text: str, /) -> int:
        """Take text; whole lines are on their way at once."""
        self.beneath.write(text)
        with self.lock:
            *whole, self.rest = (self.rest + text).split("\n")
            for line in whole:
                self.lines.put(line)
        return len(text)

    def flush(self) -> None:
        """Flush what lies beneath."""
        self.beneath.flush()

    def work(self) -> None:
        """Send lines, those of a moment together, until `finish`."""
        last = False
        while not last:
            batch = [self.lines.get()]
            with suppress(queue.Empty):
                while batch[-1] is not None:
                    batch.append(self.lines.get(timeout=LINE_SECONDS))
            last = batch[-1] is None
            if lines := [line for line in batch if line is not None]:
                self.send(lines)

    def finish(self) -> None:
        """Send what is left and wait until it has arrived."""
        if self.rest:
            self.lines.put(self.rest)
        self.lines.put(None)
        self.thread.join()


@contextmanager
def forwarding(send: Send) -> Generator[None]:
    """Let everything that this process prints be sent too, while the context is open."""
    before = sys.stdout
    forwarded = Forwarded(send, before)
    sys.stdout = forwarded
    try:
        yield
    finally:
        sys.stdout = before
        forwarded.finish()
