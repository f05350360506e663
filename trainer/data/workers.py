"""Work shared out over processes of which some may be killed.

A process that tokenises can be killed while it works, most often by the kernel because memory ran
out. Its share is done again: tasks do not depend on each other and write files of their own, so
doing one twice changes nothing. Since memory is the likely cause, half as many processes go on; and
since a cause that stays must not be met for ever, the number of such losses is bounded.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from interlace.trainer.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_LOSSES = 3
"""How often a process may be lost before the work is given up."""

_LOG = logging.getLogger(__name__)


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    finished: Callable[[Item], None],
) -> list[Result]:
    """Return what a function makes of every item, in the order of the items.

    Args:
        function: Of a module that another process can import; may be called again for an item.
        items: What to work on.
        workers: Processes at the same time.
        finished: Told of each item once, when it is done.

    Raises:
        DataError: Processes were lost again and again; or what the function raises.
    """
    done: dict[int, Result] = {}
    losses = 0
    while left := [number for number in range(len(items)) if number not in done]:
        # Spawned, not forked: the parent has threads. The caller's own module is imported again
        # there. Leaving the context waits until every process of a broken pool is gone, so that no
        # file is ever written by two of them.
        with ProcessPoolExecutor(min(workers, len(left)), get_context("spawn")) as pool:
            futures = {pool.submit(function, items[number]): number for number in left}
            try:
                for future in as_completed(futures):
                    take(future, futures, items, done, finished)
                continue
            except BrokenProcessPool as error:
                for future in futures:
                    if future.done() and future.exception() is None:
                        take(future, futures, items, done, finished)
                losses += 1
                if losses > MOST_LOSSES:
                    raise DataError(
                        f"{losses} times a process that tokenises was killed, the last time with "
                        f"data.workers={workers} of them. If the kernel did it because memory ran "
                        "out (`dmesg` tells), type data.workers=1, or cut long documents"
                    ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        workers = max(1, workers // 2)
        _LOG.warning(
            "a process that tokenises was killed; its share is done again, by %d at a time", workers
        )
    return [done[number] for number in range(len(items))]


def take(
    future: Future[Result],
    futures: dict[Future[Result], int],
    items: Sequence[Item],
    done: dict[int, Result],
    finished: Callable[[Item], None],
) -> None:
    """Keep the result of a finished future, once."""
    number, result = futures[future], future.result()
    if number not in done:
        done[number] = result
        finished(items[number])
