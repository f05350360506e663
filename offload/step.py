"""The step that is being collected: what came, what was launched, and what must not come any more.

A step opens with its first gradient and closes when every subgroup's update is launched. What goes
wrong in between is said here, in words a person can act on.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from interlace.offload.lanes import LaneError
from interlace.offload.subgroup import SubgroupState


class NonFiniteGradient(ArithmeticError):
    """A gradient is infinite or NaN; the message says whether anything was updated."""


@dataclass
class OpenStep:
    """The step whose gradients are coming in.

    Attributes:
        begun: Whether any came.
        launched: Subgroups whose update is under way; no gradient of theirs may come any more.
        norm: The global gradient norm, once somebody asked for it.
    """

    begun: bool = False
    launched: dict[SubgroupState, None] = field(default_factory=dict)
    norm: float | None = None


@dataclass
class Health:
    """Whether the state may be trusted.

    Attributes:
        settle: Blocks until no work is under way, failed or not.
        failure: Why the state may not be trusted, or None.
    """

    settle: Callable[[], None]
    failure: str | None = None

    def check(self) -> None:
        """Raise `LaneError` if the state may not be built on."""
        if self.failure is not None:
            raise LaneError(self.failure)

    @contextmanager
    def uninterrupted(self) -> Generator[None]:
        """Remember that not everything inside was done: some of a step is not the step."""
        try:
            yield
        except BaseException as error:
            self.failure = self.failure or (
                f"step() was interrupted ({type(error).__name__}) and the state is half updated: "
                "continue from a checkpoint"
            )
            raise

    @contextmanager
    def watched(self) -> Generator[None]:
        """Remember that an update failed inside: nothing may build on its state."""
        try:
            yield
        except LaneError as error:
            # Nothing may go on writing while somebody mends what failed.
            self.settle()
            self.failure = f"{error}; the state is half updated: continue from a checkpoint"
            raise LaneError(self.failure) from error


def late_gradient(name: str, declared: int) -> str:
    """Say what to do about a gradient whose update has begun without it."""
    return (
        f"a gradient of {name} came after its update had begun: overlap='backward' starts it with "
        f"gradient {declared} of a step; declare how many there are with "
        "OffloadOptions(accumulation_steps=...), or use another overlap; continue from a checkpoint"
    )


def undroppable(launched: int, subgroups: int) -> str:
    """Say why gradients can no longer be dropped."""
    return (
        f"the gradients of {launched} of {subgroups} subgroups cannot be dropped, their update has "
        "begun: call step() to finish it; overlap='forward' updates nothing before step()"
    )


def not_finite(names: Sequence[str], launched: int, subgroups: int) -> str:
    """Say which gradients are not finite and what was updated."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    where = f"gradient of {shown}" if names else "gradient on another rank"
    if not launched:
        return f"{where} is not finite; nothing was updated; zero_grad() drops the gradients"
    return (
        f"{where} is not finite, and overlap='backward' had updated {launched} of {subgroups} "
        "subgroups; continue from the last checkpoint"
    )
