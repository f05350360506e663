"""Named places in the program where a test can make it fail.

`failpoint("persist.half")` does nothing unless the environment variable INTERLACE_FAILPOINT names
that place: `NAME[@VISIT][:ACTION]`, for example `persist.half@3:kill`. VISIT counts the visits of
the point in this process from 1 (default 1); the action happens once, at that visit, or at every
visit if VISIT is `*`. ACTION is one of

    kill      SIGKILL to this process (the default)
    stop      SIGSTOP to this process, so that a test can choose what happens before it goes on
    delay     sleep 0.2 seconds
    burn      keep a core busy for 0.2 seconds
    hang      wait for ever in C code that holds the interpreter's lock
    sigterm   SIGTERM to this process
    sigint    SIGINT to this process
    raise     raise FailpointHit
    enospc    raise OSError: no space left on device
    eio       raise OSError: input/output error
    nomem     raise MemoryError
    nan       make the number here NaN (at `step.loss` only, as `spike`)
    spike     make the number here a hundred times what it is

Tests hold what is left against the log of commits that INTERLACE_ACK_LOG names; see
`acknowledgements`.

INTERLACE_FAILPOINT_RANK limits it to the process whose RANK (0 if unset) is that number. There is
no other way to arm a point, so a normal run cannot trip over one.
"""

import ctypes
import errno
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self, TypeVar

from interlace.trainer.errors import UserError

VARIABLE = "INTERLACE_FAILPOINT"
RANK_VARIABLE = "INTERLACE_FAILPOINT_RANK"

DELAY_SECONDS = 0.2

FAILPOINTS = frozenset(
    {
        "load.mid",
        "manifest.half",
        "manifest.open",
        "manifest.post_rename",
        "manifest.pre",
        "manifest.pre_fsync",
        "persist.half",
        "persist.open",
        "persist.post_rename",
        "persist.pre_fsync",
        "publish.post_rename",
        "publish.pre_rename",
        "retain.mid",
        "snap.begin",
        "snap.chunk",
        "step.backward",
        "step.forward",
        "step.loss",
        "step.update",
    }
)


class FailpointHit(RuntimeError):
    """Raised by the action `raise`."""


@dataclass(frozen=True)
class _Armed:
    """What the variable asks for."""

    name: str
    visit: int | None
    action: str


# Counts only the visits of the armed point, so an unarmed program keeps nothing.
_visits: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Fail here if the environment says so; otherwise cost one look-up.

    Args:
        name: A member of `FAILPOINTS`.

    Raises:
        UserError: The variable holds something that is not a failpoint setting.
        FailpointHit: The armed action is `raise`.
        OSError: The armed action is `enospc` or `eio`.
    """
    action = _armed_action(name)
    if action is not None:
        _ACTIONS[action](name)


class Scales(Protocol):
    """A number, or a tensor."""

    def __mul__(self, factor: float, /) -> Self: ...


Number = TypeVar("Number", bound=Scales)


def disturbed(name: str, number: Number) -> Number:
    """Return a number as it is, or what the armed action makes of it; other actions fail as at any
    point.

    Raises:
        UserError: The variable holds something that is not a failpoint setting.
    """
    action = _armed_action(name)
    if action is None:
        return number
    if action in _FACTORS:
        return number * _FACTORS[action]
    _ACTIONS[action](name)
    return number


def forget_visits() -> None:
    """Count from 1 again, for tests that arm several points in one process."""
    _visits.clear()


def _armed_action(name: str) -> str | None:
    """Count a visit; return what is to happen at it."""
    assert name in FAILPOINTS, f"failpoint {name!r} is not registered"
    setting = os.environ.get(VARIABLE)
    if setting is None:
        return None
    armed = _parse(setting)
    rank = os.environ.get(RANK_VARIABLE)
    if armed.name != name or (rank is not None and _parse_rank(rank) != _own_rank()):
        return None
    _visits[name] += 1
    return armed.action if armed.visit is None or _visits[name] == armed.visit else None


@lru_cache(maxsize=8)
def _parse(setting: str) -> _Armed:
    match = re.fullmatch(r"([a-z_.]+)(?:@(\*|[1-9][0-9]{0,8}))?(?::([a-z]+))?", setting)
    if match is not None:
        name, action = match[1], match[3] or "kill"
        visit = None if match[2] == "*" else int(match[2] or 1)
        if name in FAILPOINTS and (action in _ACTIONS or (action, name) in _DISTURBANCES):
            return _Armed(name, visit, action)
    raise UserError(
        f"{VARIABLE}={setting!r} is not a failpoint, so nothing would fail where you expect it. "
        f"Write NAME[@VISIT][:ACTION], or unset it. Names: {', '.join(sorted(FAILPOINTS))}. "
        f"Actions: {', '.join([*_ACTIONS, *_FACTORS])}."
    )


def _parse_rank(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise UserError(
            f"{RANK_VARIABLE}={text!r} is not a rank, so no process would fail. "
            "Write a number from 0, or unset it for any rank."
        )
    return int(text)


def _own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _sender(signal_number: signal.Signals) -> Callable[[str], None]:
    def send(name: str) -> None:
        del name
        os.kill(os.getpid(), signal_number)

    return send


def _raiser(error_number: int) -> Callable[[str], None]:
    def fail(name: str) -> None:
        raise OSError(error_number, f"{os.strerror(error_number)} (failpoint {name})")

    return fail


def _burn(name: str) -> None:
    del name
    end = time.thread_time() + DELAY_SECONDS
    while time.thread_time() < end:
        pass


def _hang(name: str) -> None:
    del name
    # PyDLL keeps the lock. Of what can wait for ever, reading goes on after a signal was handled.
    empty, _ = os.pipe()
    ctypes.PyDLL(None).read(empty, ctypes.create_string_buffer(1), 1)


def _sleep(name: str) -> None:
    del name
    time.sleep(DELAY_SECONDS)


def _raise_hit(name: str) -> None:
    raise FailpointHit(name)


def _raise_no_memory(name: str) -> None:
    raise MemoryError(f"failpoint {name}")


_ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": _sender(signal.SIGKILL),
    "stop": _sender(signal.SIGSTOP),
    "delay": _sleep,
    "burn": _burn,
    "hang": _hang,
    "raise": _raise_hit,
    "enospc": _raiser(errno.ENOSPC),
    "eio": _raiser(errno.EIO),
    "nomem": _raise_no_memory,
    "sigterm": _sender(signal.SIGTERM),
    "sigint": _sender(signal.SIGINT),
}

_FACTORS = {"nan": math.nan, "spike": 100.0}

# Elsewhere there is no number that they could change.
_DISTURBANCES = {(action, "step.loss") for action in _FACTORS}
