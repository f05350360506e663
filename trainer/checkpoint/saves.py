"""A checkpoint from its snapshot to its publication, by all ranks together.

`Save.begin` takes the snapshot and returns at once; each rank writes its own file in the
background; `publish` gathers what the ranks have written, and rank 0 commits it. When every rank is
done is learnt elsewhere, in the exchange that each step has anyway. Whatever fails on one rank
fails on all: they raise the same error at the same point.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from interlace.trainer.checkpoint.commit import CheckpointStore, Superseded
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.interval import Costs
from interlace.trainer.checkpoint.ledger import GIVEN_UP, Pool
from interlace.trainer.checkpoint.live import Source
from interlace.trainer.checkpoint.snapshot import Snapshot
from interlace.trainer.checkpoint.state import (
    Progress,
    RandomState,
    SavedScalars,
    TrainingState,
)
from interlace.trainer.checkpoint.tensors import merge_indexes
from interlace.trainer.errors import CheckpointError, SaveError
from interlace.trainer.world import World

Failure = SaveError | Superseded
"""Why a save did not happen: it may be tried again, or another start of the run has taken over."""


@dataclass(frozen=True)
class Target:
    """Where a start of a run saves, and what it says of itself in every checkpoint.

    Attributes:
        store: The run's checkpoints.
        attempt: The fencing token of this start of the run.
        scalars: `config`, `corpus_digest`, `vocabulary_size` and `manifest` of `SavedScalars`.
        pool: Room for what updates have to copy while a snapshot is read.
    """

    store: CheckpointStore
    attempt: int
    scalars: Mapping[str, object]
    pool: Pool


class Save:
    """One checkpoint that is being written.

    Attributes:
        progress: The run's counters when the snapshot was taken.
        snapshot: This rank's part.
        began: Seconds on `time.perf_counter`.
        stood_still: Seconds that training waited for this save between steps.
        waited: Those among them during which this rank's file was still being written.
    """

    def __init__(self, target: Target, state: TrainingState, progress: Progress) -> None:
        self.target = target
        self.world = world = state.world
        self.progress = progress
        self.began = time.perf_counter()
        self.stood_still = 0.0
        self.waited = 0.0
        # By value, before training changes it.
        self.random_state = RandomState.capture(world.device)
        sources = [Source.of(live, world.rank) for live in state.live()]
        folder = target.store.inflight_path(progress.step, target.attempt)
        name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
        failpoint("snap.begin")
        self.snapshot = Snapshot(
            [source for source in sources if source is not None],
            target.pool,
            folder / name,
            world.device,
        )

    @classmethod
    def begin(cls, target: Target, state: TrainingState, progress: Progress) -> "Save":
        """Take a snapshot of the state after a step and begin to write it; every rank calls this.

        Raises:
            SaveError: There is no room, or the folder cannot be made.
            Superseded: A newer start of the run has taken over.
        """
        entered = time.perf_counter()
        world, step = state.world, progress.step
        needed = sum(live.global_bytes for live in state.live())
        store, attempt = target.store, target.attempt
        failure = attempt_on_main(world, lambda: store.reserve(step, attempt, needed))
        if failure is not None:
            raise failure
        begun = cls(target, state, progress)
        begun.stood_still = time.perf_counter() - entered
        return begun

    @property
    def costs(self) -> Costs:
        """What this save has cost, once it is committed."""
        held_up = self.snapshot.ledger.claiming_seconds
        beside = self.stood_still - self.waited
        return Costs(self.stood_still + held_up, beside + self.snapshot.seconds)

    def publish(self) -> None:
        """Commit what all ranks have written, waiting for those that have not; every rank calls
        this.

        Raises:
            SaveError: Some rank could not write, or rank 0 not commit; nothing is left of it.
            Superseded: A newer start of the run has taken over.
        """
        entered = time.perf_counter()
        self.snapshot.wait()
        self.waited = time.perf_counter() - entered
        failure = self._publish()
        self.stood_still += time.perf_counter() - entered
        if failure is not None:
            self.abandon()
            raise failure

    def abandon(self) -> None:
        """Stop writing on every rank and remove the unfinished folder; every rank calls this."""
        self.snapshot.give_up()
        # Nobody may write there any more when it is removed.
        self.world.barrier()
        if self.world.is_main:
            self.target.store.abandon(self.progress.step, self.target.attempt)
        self.world.barrier()

    def _publish(self) -> Failure | None:
        mine = self.snapshot.written or self.snapshot.error or "nothing was written"
        told = self.world.gather((mine, self.random_state))
        errors = [written for written, _ in told if isinstance(written, str)]
        if errors:
            # Others were asked to stop because one of them failed.
            return self._reason(next((each for each in errors if each != GIVEN_UP), errors[0]))
        files = [written[0] for written, _ in told if not isinstance(written, str)]
        indexes = [written[1] for written, _ in told if not isinstance(written, str)]
        random_states = [random_state for _, random_state in told]
        saved = SavedScalars.model_validate(
            {
                **self.target.scalars,
                "progress": self.progress,
                "random_states": tuple(random_states),
            }
        )

        def commit() -> None:
            index = {
                name: entry.model_dump(exclude_none=True)
                for name, entry in merge_indexes(indexes).items()
            }
            payload = {"tensors": index, "scalars": saved.model_dump(mode="json")}
            self.target.store.publish(self.progress.step, self.target.attempt, files, payload)

        return attempt_on_main(self.world, commit)

    def _reason(self, error: str) -> Failure:
        """Return the failure of a rank that could not write: that a newer start took its folder
        away is no error of the disk.
        """
        store, attempt = self.target.store, self.target.attempt
        superseded = attempt_on_main(self.world, lambda: store.require_live(attempt))
        return superseded or SaveError(error)


def save(target: Target, state: TrainingState, progress: Progress) -> Save:
    """Commit a checkpoint of this step and wait for it; every rank takes part and every rank learns
    the outcome.

    Raises:
        SaveError: Some rank could not write (disk full, for one); the unfinished folder is removed
            and older checkpoints are as they were.
        Superseded: A newer start of the run has taken over; this one must stop.
    """
    begun = Save.begin(target, state, progress)
    begun.publish()
    return begun


def settle(target: Target, world: World, step: int) -> bool:
    """Return whether a save of this start that failed is a checkpoint all the same, and see that it
    lasts; every rank calls this.

    Raises:
        SaveError: The disk still fails.
        Superseded: A newer start of the run has taken over.
    """
    settled: list[bool] = []
    store, attempt = target.store, target.attempt
    failure = attempt_on_main(world, lambda: settled.append(store.settle(step, attempt)))
    if failure is not None:
        raise failure
    return world.broadcast(settled == [True])


def attempt_on_main(world: World, action: Callable[[], object]) -> Failure | None:
    """Run `action` on rank 0 and tell every rank how it failed, or None."""
    failure: Failure | None = None
    if world.is_main:
        try:
            action()
        except Superseded as error:
            failure = error
        except (SaveError, CheckpointError, OSError) as error:
            failure = SaveError(str(error))
    return world.broadcast(failure)
