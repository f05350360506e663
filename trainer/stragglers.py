"""Names the rank that keeps the others waiting.

Every rank tells the seconds of its own work (`heartbeat.OwnTime`) in the exchange that each step
has anyway, so all ranks know those of all. A rank whose usual step (the median of ten) takes
`watchdog.straggler_factor` times that of the median rank is named, once in a start. Nobody is
excluded for being slow: whether a machine is replaced is for a person to decide.
"""

from collections import deque
from collections.abc import Sequence

WINDOW = 10
LEAST_SECONDS = 0.002
"""Differences below this are noise of the scheduler, whatever their ratio."""


class Stragglers:
    """What the ranks have told of their own seconds.

    Args:
        size: Number of ranks.
        factor: From which multiple of the median rank's seconds a rank counts as slow; 0 for never.
    """

    def __init__(self, size: int, factor: float) -> None:
        self.factor = factor if size > 1 else 0.0
        self.recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self.named: set[int] = set()

    def observe(self, seconds: Sequence[float]) -> dict[int, str]:
        """Take note of one step.

        Args:
            seconds: Own work of every rank, in rank order.

        Returns:
            A sentence for every rank that turns out to be slow and was not named before, the
            slowest first.
        """
        self.recent.append(seconds)
        if not self.factor or len(self.recent) < WINDOW:
            return {}
        usual = [middle(of_rank) for of_rank in zip(*self.recent, strict=True)]
        median = middle(usual)
        slow = [
            rank
            for rank, own in enumerate(usual)
            if own > self.factor * median and own - median > LEAST_SECONDS
        ]
        news = {rank: usual[rank] for rank in slow if rank not in self.named}
        self.named.update(news)
        return {
            rank: f"rank {rank} is slow: its own work takes {own:.3g} s a step, that of the "
            f"median rank {median:.3g} s (over {WINDOW} steps); the others wait for it"
            for rank, own in sorted(news.items(), key=lambda item: -item[1])
        }


def middle(values: Sequence[float]) -> float:
    """Return the median; of an even number, the lower of the two in the middle, so that of two
    ranks the faster one is the measure.
    """
    return sorted(values)[(len(values) - 1) // 2]
