"""Checks of the `[watchdog]` table; each returns None or one message with key, value, reason and
remedy, as those in `checks`.
"""

from interlace.trainer.config.schema import RunConfig

LEAST_SECONDS = 1.0


def watchdog_leaves_time_for_a_phase(config: RunConfig) -> str | None:
    """A limit below a second would end runs because a machine was busy."""
    seconds = config.watchdog.seconds
    if not seconds or seconds >= LEAST_SECONDS:
        return None
    return (
        f"watchdog.seconds={seconds}: a machine that is busy may keep a rank waiting for so long; "
        "type watchdog.seconds=1 or more, or watchdog.seconds=0 to turn the watchdog off"
    )


def stragglers_are_slower_than_the_median(config: RunConfig) -> str | None:
    """With a factor of 1 or less half of all ranks would count as slow."""
    factor = config.watchdog.straggler_factor
    if not factor or factor > 1.0:
        return None
    return (
        f"watchdog.straggler_factor={factor}: half of all ranks take that many times the median "
        "rank's seconds; type watchdog.straggler_factor=1.5 or another number above 1, or 0 to "
        "name nobody"
    )
