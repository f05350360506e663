"""When a run saves itself, and what happens when that fails.

A save begins at the end of a step and goes on in the background. In the exchange of every step the
ranks tell each other how far they are; at the end of the first step at which all are done, the
checkpoint is published. A save that fails is told and given up, and training goes on; at the second
one in a row training stands still and the save is repeated with growing pauses, for what cannot be
saved is lost sooner or later; then the run stops. Asked to stop, a run saves where it is, if what
saves have taken so far fits into the time that is left.
"""

import math
import time
from collections.abc import Callable, Mapping

import torch

from interlace.trainer.checkpoint.interval import Costs
from interlace.trainer.checkpoint.ledger import Pool
from interlace.trainer.checkpoint.pace import Pace
from interlace.trainer.checkpoint.saves import Save, Target, save, settle
from interlace.trainer.checkpoint.state import Progress
from interlace.trainer.errors import Preempted, SaveError, StorageError
from interlace.trainer.observe.console import Console
from interlace.trainer.parts import Parts
from interlace.trainer.signals import StopRequest

LOOK_SECONDS = 0.25
"""While a failed save is waited for: seconds between looks at whether to stop."""

LEAVING_SECONDS = 5.0
"""How long a run that ends in an error waits for a save to give up."""


class Saving:
    """The checkpoints of a run in progress.

    Args:
        parts: What the run is made of.
        saved_step: The step that the run begins at.
        console: Where a failure is told.
        stop: Tells whether, and until when, the run is asked to stop.

    Attributes:
        on_commit: Called on every rank with the step of each checkpoint that was committed.
        under_way: The save that is being written.
        failures: Saves that failed since the last that did not.
    """

    def __init__(self, parts: Parts, saved_step: int, console: Console, stop: StopRequest) -> None:
        self.parts = parts
        self.settings = parts.config.checkpoint
        self.saved_step = saved_step
        self.console = console
        self.stop = stop
        self.on_commit: Callable[[int], None] | None = None
        self.under_way: Save | None = None
        self.failures = 0
        self.pace = Pace(self.settings, parts.plan.steps)
        self.heard: Mapping[str, float] = {}
        scalars = {
            "config": parts.config.model_dump(mode="json"),
            "corpus_digest": parts.corpus_digest,
            "vocabulary_size": parts.plan.vocabulary_size,
            "manifest": parts.manifest.document,
        }
        budget = self.settings.copy_budget_gib
        pool = Pool(None if budget is None else int(budget * 2**30))
        self.target = Target(parts.folder.store, parts.attempt, scalars, pool)

    # ---- what ranks tell each other -----------------------------------------------------------

    def flags(self) -> dict[str, float]:
        """Return what this rank tells the others in the exchange of a step."""
        snapshot = self.under_way.snapshot if self.under_way is not None else None
        return {
            "persisted": float(snapshot is not None and snapshot.written is not None),
            "persist_failed": float(snapshot is not None and snapshot.error is not None),
            "save": float(self.parts.world.is_main and self.pace.is_time()),
        }

    def hear(self, flags: Mapping[str, float]) -> None:
        """Take note of what all ranks told."""
        self.heard = flags

    # ---- between steps ------------------------------------------------------------------------

    def save_if_due(self, progress: Progress) -> None:
        """Publish what is written; begin a save when one is due and the one before is over.

        Raises:
            StorageError: Nothing could be saved, however often it was tried.
            Superseded: A newer start of the run has taken over.
        """
        self.pace.step_done()
        heard, self.heard = self.heard, {}
        if self.under_way is not None and heard.get("persist_failed"):
            # What the other ranks write is of no use any more; one that waits for its disk takes as
            # long to give up as to publish.
            self.parts.heartbeat.enter("publish")
            self.under_way.snapshot.give_up()
        everybody = heard.get("persisted") == self.parts.world.size
        due = self.pace.is_due(progress.step, heard.get("save", 0.0) > 0)
        # A save that is due waits for the one before.
        if everybody or heard.get("persist_failed") or due:
            self.publish(progress)
        # A state whose last step was not finite may be why, and must not displace a sound one.
        sound = progress.skipped_in_a_row == 0
        if due and sound and self.saved_step != progress.step:
            self.begin(progress)

    def begin(self, progress: Progress) -> None:
        """Begin to save the state after a step."""
        self.pace.begun()
        self.parts.heartbeat.enter("snapshot")
        try:
            self.under_way = Save.begin(self.target, self.parts.state, progress)
        except SaveError as error:
            self.failed(error, progress.step, progress)
            return
        if not self.settings.asynchronous:
            self.publish(progress)

    def publish(self, progress: Progress) -> None:
        """Commit the save under way, if there is one, waiting for it.

        Args:
            progress: The run's counters now.
        """
        if self.under_way is None:
            return
        done, self.under_way = self.under_way, None
        self.parts.heartbeat.enter("publish")
        try:
            done.publish()
        except SaveError as error:
            self.failed(error, done.progress.step, progress)
            return
        self.committed(done.progress.step, done.costs)

    def save_now(self, progress: Progress) -> None:
        """Commit the present state, waiting for it.

        Raises:
            SaveError: Some rank could not write, or rank 0 not commit.
            Superseded: A newer start of the run has taken over.
        """
        done = save(self.target, self.parts.state, progress)
        self.committed(progress.step, done.costs)

    def committed(self, step: int, costs: Costs | None = None) -> None:
        """Take note of a checkpoint that was committed, and of its costs if they are known; let old
        ones go.
        """
        self.saved_step, self.failures = step, 0
        if costs is not None and (told := self.pace.learn(costs)):
            self.console.note(told)
        if self.on_commit is not None:
            self.on_commit(self.saved_step)
        if self.parts.world.is_main:
            self.parts.folder.store.retain(self.settings.keep_last, self.settings.keep_every_steps)

    # ---- failures -----------------------------------------------------------------------------

    def failed(self, error: SaveError, step: int, progress: Progress) -> None:
        """Tell of a save that failed; do not go on after the second in a row without one that does
        not.

        Args:
            error: Why it failed.
            step: Whose state was not saved.
            progress: The run's counters now.

        Raises:
            StorageError: Nothing could be saved, however often it was tried.
        """
        self.console.note(f"checkpoint at step {step} failed: {error}")
        self.failures += 1
        if self.failures > 1:
            self.insist(progress, error)

    def insist(self, progress: Progress, error: SaveError, concluding: bool = False) -> None:
        """Save the present state after one or more pauses, each twice as long as the one before.

        Args:
            progress: The run's counters.
            error: Why it could not be saved.
            concluding: Whether the run stops afterwards anyway.

        Raises:
            StorageError: It failed every time, or there is no time to try.
        """
        pause, tries = self.settings.retry_seconds, self.settings.tries
        for number in range(1, tries + 1):
            if not self.paused(pause, concluding):
                break
            pause *= 2
            try:
                if settle(self.target, self.parts.world, progress.step):
                    self.committed(progress.step)
                else:
                    self.save_now(progress)
            except SaveError as again:
                error = again
                step = progress.step
                self.console.note(f"checkpoint at step {step}, try {number} of {tries}: {error}")
            else:
                return
        raise StorageError(
            f"the state after step {progress.step} cannot be saved, so the run stops: {error}\n"
            f"The newest checkpoint is of step {self.saved_step}; resume when the storage is well. "
            f"checkpoint.tries={tries} and checkpoint.retry_seconds="
            f"{self.settings.retry_seconds:g} say how long that is waited for"
        )

    def paused(self, seconds: float, concluding: bool = False) -> bool:
        """Wait, on all ranks alike; return False, early, if one of them is asked to stop. A run
        that stops anyway waits unless there is no time for that and a save.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            waits = self.parts.world.is_main and left > 0
            late = self.stop.seconds_left < max(left, 0.0) + self.pace.expected_seconds
            asked = torch.tensor([float(late if concluding else self.stop.received), float(waits)])
            stops, waiting = self.parts.world.sum(asked).tolist()
            if stops or not waiting:
                return not stops
            self.parts.heartbeat.beat()
            time.sleep(min(LOOK_SECONDS, seconds))

    # ---- the end ------------------------------------------------------------------------------

    def conclude(self, progress: Progress) -> None:
        """Commit what is not committed yet, after the last step or when asked to stop.

        Raises:
            Preempted: Asked to stop, and a save would take longer than there is time.
            StorageError: The last state could not be saved; the newest checkpoint is older.
        """
        world, store = self.parts.world, self.parts.folder.store
        self.parts.heartbeat.enter("conclude")
        if self.under_way is not None:
            began = time.perf_counter() - self.under_way.began
            self.require_time(progress, began)
            self.publish(progress)
        if self.saved_step == progress.step and world.on_main(store.committed_steps):
            return
        self.require_time(progress, 0.0)
        try:
            self.save_now(progress)
        except SaveError as error:
            self.console.note(f"checkpoint at step {progress.step} failed: {error}")
            self.insist(progress, error, concluding=True)

    def require_time(self, progress: Progress, spent: float) -> None:
        """Do nothing if the time that is left is enough for a save; every rank calls this.

        Args:
            progress: The run's counters.
            spent: Seconds since the save began.

        Raises:
            Preempted: It is not; what is under way was given up.
        """
        mine = (self.stop.seconds_left, self.pace.expected_seconds - spent)
        told = self.parts.world.gather(mine)
        left, needed = min(pair[0] for pair in told), max(pair[1] for pair in told)
        if math.isinf(left) or needed <= left:
            return
        if self.under_way is not None:
            self.under_way.abandon()
            self.under_way = None
        notice = self.settings.notice_seconds
        raise Preempted(
            f"stopped after step {progress.step} without saving it: that takes about {needed:.1f} "
            f"s, and {max(left, 0.0):.1f} s are left (checkpoint.notice_seconds={notice:g}). The "
            f"newest checkpoint is of step {self.saved_step}. Resume with\n"
            f"    interlace train --resume {self.parts.folder.path}"
        )

    def close(self) -> None:
        """Give up what is under way, on this rank alone; for a run that ends in an error."""
        if self.under_way is not None:
            self.under_way.snapshot.give_up(LEAVING_SECONDS)
            self.under_way = None
