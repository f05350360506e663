"""When a run saves itself, and what happens when that fails."""

from collections.abc import Callable

from interlace.trainer.checkpoint.state import Progress, save
from interlace.trainer.errors import SaveError
from interlace.trainer.observe.console import Console
from interlace.trainer.parts import Parts


class Saving:
    """The checkpoints of a run in progress.

    Args:
        parts: What the run is made of.
        saved_step: The step that the run begins at.
        console: Where a failure is told.
    """

    def __init__(self, parts: Parts, saved_step: int, console: Console) -> None:
        self.parts = parts
        self.saved_step = saved_step
        self.console = console
        self.on_commit: Callable[[int], None] | None = None

    def save_if_due(self, progress: Progress) -> None:
        """Commit a checkpoint every so many steps; a save that fails does not stop the training."""
        every, step = self.parts.config.checkpoint.every_steps, progress.step
        if every and step % every == 0 and step < self.parts.plan.steps:
            self.save(progress)

    def save(self, progress: Progress) -> str | None:
        """Commit the state after the last finished step and let old checkpoints go.

        Returns:
            None, or why the checkpoint could not be written.
        """
        parts, keep = self.parts, self.parts.config.checkpoint
        scalars = {
            "config": parts.config.model_dump(mode="json"),
            "corpus_digest": parts.corpus_digest,
            "vocabulary_size": parts.plan.vocabulary_size,
            "manifest": parts.manifest.document,
        }
        try:
            save(parts.folder.store, parts.attempt, parts.state, scalars, progress)
        except SaveError as error:
            self.console.note(f"checkpoint at step {progress.step} failed: {error}")
            return str(error)
        self.saved_step = progress.step
        if self.on_commit is not None:
            self.on_commit(progress.step)
        if parts.world.is_main:
            parts.folder.store.retain(keep.keep_last, keep.keep_every_steps)
        return None

    def conclude(self, progress: Progress) -> None:
        """Commit what is not committed yet, after the last step or on a stop signal.

        Raises:
            SaveError: The last state could not be saved; the newest checkpoint is older.
        """
        if self.saved_step == progress.step and self.parts.folder.store.committed_steps():
            return
        failure = self.save(progress)
        if failure is not None:
            raise SaveError(
                f"the state after step {progress.step} is not saved: {failure}; "
                f"the newest checkpoint is of step {self.saved_step}"
            )
