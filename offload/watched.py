"""State whose changes are announced: who wants to read it whole is told before it changes."""

from collections.abc import Callable


class Watched:
    """Something with state that others may be reading.

    Attributes:
        version: How often the state has begun to change; with no work under way, that of the state.
        before_change: Called before the state changes, by whoever is going to change it, and waited
            for: a snapshot takes there what it has not read yet. None where nobody cares.
    """

    version: int
    before_change: "Callable[[Watched], None] | None"

    def __init__(self) -> None:
        self.version = 0
        self.before_change = None

    def about_to_change(self) -> None:
        """Called by whoever is going to write to the state, on his own thread: wait until everybody
        else is content, and count.
        """
        # Asked once: whoever waits to be told may lose interest at any time, on another thread.
        before_change = self.before_change
        if before_change is not None:
            before_change(self)
        self.version += 1
