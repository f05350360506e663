"""What surrounds a run: its start is recorded, its ranks are watched, and so is how each one ends.

Nothing here is known before the run folder has been chosen and the attempt has its number; `begin`
is called then, on all ranks.
"""

import sys
from datetime import timedelta
from types import TracebackType

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.watchdog_section import WatchdogSection
from interlace.trainer.ends import (
    End,
    Kind,
    is_of_a_peer,
    mark_recorded,
    readable_traceback,
    record_end,
)
from interlace.trainer.errors import UserError
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.run_folder import RunFolder
from interlace.trainer.starts import record_start, require_progress
from interlace.trainer.watchdog.patience import LEAST_SECONDS, TIMES_WHILE_PATIENT
from interlace.trainer.watchdog.watch import Watch
from interlace.trainer.world import World, limit_waiting


class Supervision:
    """Context manager around a run, on every rank.

    Args:
        config: The recipe.
        world: The ranks.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.settings: WatchdogSection = config.watchdog
        self.world = world
        self.folder: RunFolder | None = None
        self.attempt = 0
        self.heartbeat = Heartbeat()
        self.watch: Watch | None = None

    def begin(self, folder: RunFolder, attempt: int) -> Heartbeat:
        """Record the start and have this rank watched; return where it marks its phases.

        Raises:
            NoProgress: The run has been started again too often in vain.
        """
        self.folder, self.attempt = folder, attempt
        self.world.on_main(self.admit)
        limit = self.settings.seconds
        if limit != 0:
            world = self.world
            self.watch = Watch(folder.path, attempt, world.rank, world.size, limit)
            self.heartbeat = self.watch.heartbeat
            # Nobody needs to wait in a collective for longer than the watchdog would allow.
            longest = TIMES_WHILE_PATIENT * max(limit or 0.0, LEAST_SECONDS)
            limit_waiting(world, timedelta(seconds=longest))
        return self.heartbeat

    def admit(self) -> None:
        """Record the start; refuse it if it would be in vain."""
        assert self.folder is not None
        steps = self.folder.store.committed_steps()
        start = record_start(
            self.folder.path, self.attempt, steps[-1] if steps else 0, self.world.size
        )
        require_progress(self.folder.path, start)

    def __enter__(self) -> "Supervision":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.folder is not None:
            self.record(self.folder, error)
        if self.watch is not None:
            self.watch.close()

    def record(self, folder: RunFolder, error: BaseException) -> None:
        """Write how this rank ends, and note on the error that it is written."""
        kind, status = judge(error, self.world.size)
        if kind == "peer" and self.watch is not None:
            self.watch.leave_if_stalled()
        pulse = self.heartbeat.pulse
        end = End(
            attempt=self.attempt,
            rank=self.world.rank,
            kind=kind,
            reason=str(error) or type(error).__name__,
            status=status,
            step=pulse.step,
            phase=pulse.phase,
            traceback=readable_traceback(error) if kind in ("error", "peer") else "",
        )
        path = record_end(folder.path, end)
        if path is None:
            print(f"interlace: how rank {end.rank} ended could not be written", file=sys.stderr)
        else:
            mark_recorded(error, path)


def judge(error: BaseException, world_size: int) -> tuple[Kind, int]:
    """Return in one word why one of so many ranks ends, and the exit status that goes with it."""
    if isinstance(error, UserError):
        status = status_of(error)
        return ("stopped" if status == Exit.PREEMPTED else "mistake"), status
    if isinstance(error, KeyboardInterrupt):
        return "stopped", Exit.INTERRUPTED
    return ("peer" if world_size > 1 and is_of_a_peer(error) else "error"), Exit.DEFECT
