"""Reads what Python's faulthandler writes: the stacks of all threads, innermost frame first."""

import re
from collections.abc import Iterator

_HEAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")


def frames_of(text: str, thread: int) -> list[str]:
    """Return the frames of one thread, innermost first, as `File "...", line 3 in name`.

    Args:
        text: One dump of faulthandler.
        thread: Identity of the thread, as `threading.get_ident` tells it; if the dump does not have
            it, the frames of the current thread or else of the last one.
    """
    stacks = dict(_stacks(text))
    if not stacks:
        return []
    return stacks.get(thread, list(stacks.values())[-1])


def _stacks(text: str) -> Iterator[tuple[int, list[str]]]:
    frames: list[str] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            frames = []
            yield int(head[1], 16), frames
        elif line.startswith("  File "):
            frames.append(line.strip())
