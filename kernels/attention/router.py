"""Which back end serves a call of attention, and why."""

import os
from dataclasses import dataclass

from interlace.kernels.attention.backends import BACKENDS, Backend
from interlace.kernels.attention.request import Request

FORCED_BY = "INTERLACE_ATTENTION"
"""Environment variable that names a back end for calls that leave the choice open."""


@dataclass(frozen=True)
class Choice:
    """A back end and the reasons for it.

    Attributes:
        backend: What will run.
        reasons: One sentence each, in the order in which they decided.
    """

    backend: Backend
    reasons: tuple[str, ...]

    def explain(self) -> str:
        """Return the choice in words."""
        return "\n".join((f"{self.backend.name}: {self.backend.what}", *self.reasons))


def choose(request: Request, backend: str = "auto") -> Choice:
    """Return the back end for a request.

    Args:
        request: The call.
        backend: A name, or `auto`.

    Raises:
        ValueError: The name is unknown, or the back end it names cannot serve the request.
    """
    source = f"backend={backend!r}"
    if backend == "auto" and os.environ.get(FORCED_BY):
        backend = os.environ[FORCED_BY]
        source = f"{FORCED_BY}={backend}"
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"attention: {source}: must be one of {known}")
    if backend != "auto":
        why_not = BACKENDS[backend].why_not(request)
        if why_not is not None:
            raise ValueError(f"attention: {source} cannot serve this call: {why_not}")
        return Choice(BACKENDS[backend], (f"forced by {source}",))
    for name in ("triton", "chunked") if request.order > 1 else ("sdpa", "triton", "chunked"):
        skipped = name == "triton" and request.device != "cuda"
        if not skipped and BACKENDS[name].why_not(request) is None:
            return Choice(BACKENDS[name], ())
    raise AssertionError("chunked serves everything")
