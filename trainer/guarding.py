"""What a run does about steps whose numbers cannot be right."""

from collections.abc import Sequence

from interlace.trainer.checkpoint.state import Progress
from interlace.trainer.data.gaps import batch_of, gap_text, with_gap
from interlace.trainer.errors import NumericsError
from interlace.trainer.evidence import save_evidence
from interlace.trainer.guards.integrity import Integrity
from interlace.trainer.guards.spikes import STOP_WITHIN, SpikeMemory, spike_in
from interlace.trainer.observe.console import Console
from interlace.trainer.parts import Parts


class Guarding:
    """Judges every step before its update, on all ranks alike.

    Args:
        parts: What the run is made of.
        console: Where bad steps are told.
    """

    def __init__(self, parts: Parts, console: Console) -> None:
        self.parts = parts
        self.console = console
        self.integrity = Integrity(parts, self.way_back)

    def judged(self, step: int, progress: Progress, loss: float, norm: float) -> Progress:
        """Return the counters after this step; whether its update is left out shows in them.

        An update is left out if loss or gradient are not finite, unless the update rule guards
        against single coordinates that are not; and if they stand out far above the recent ones.

        Raises:
            NumericsError: Too many such steps; the evidence is in the run folder.
        """
        if not (is_finite(loss) and is_finite(norm)):
            skipped = not self.parts.state.engine.guards
            after = advance(progress, self.parts.plan.tokens_per_step, skipped=skipped)
            count = progress.skipped_in_a_row + 1
            self.report_bad_step(step, count, loss, norm)
            return after.model_copy(update={"skipped_in_a_row": count})
        settings, memory = self.parts.config.guard, progress.spikes
        spike = spike_in(memory, loss, norm, settings.spike_sigmas, settings.spike_window)
        after = advance(progress, self.parts.plan.tokens_per_step, skipped=spike is not None)
        if spike is not None:
            memory = memory.after_skip(step + 1)
            self.report_spike(step, memory, spike)
            return after.model_copy(update={"spikes": memory})
        if settings.spike_sigmas:
            memory = memory.accepted(loss, norm, settings.spike_window)
        return after.model_copy(update={"spikes": memory, "skipped_in_a_row": 0})

    def report_spike(self, step: int, memory: SpikeMemory, spike: str) -> None:
        """Tell of a step that is skipped as a spike; stop the run when there were too many."""
        parts, settings = self.parts, self.parts.config.guard
        count, limit = len(memory.recent), settings.max_spikes
        self.console.note(
            f"step {step + 1}: {spike}, {settings.spike_sigmas:g} standard deviations above the "
            f"mean of the last {len(memory.losses)} steps; update skipped ({count} within "
            f"{STOP_WITHIN} steps, {limit} stop the run)"
        )
        if count < limit:
            return
        folder = save_evidence(parts.folder.path, step, parts.batches, parts.state)
        back = self.way_back(memory.recent[0], self.gap_over(memory.recent))
        raise NumericsError(
            f"{count} updates within {STOP_WITHIN} steps were skipped as spikes "
            f"(guard.max_spikes={limit}), of steps {', '.join(map(str, memory.recent))}; of the "
            f"last, {spike}. The evidence is in {folder}; the newest checkpoint is untouched. "
            f"Lower optimizer.peak_lr={parts.config.optimizer.peak_lr}, and resume; or go back and "
            f"leave these batches out: {back}"
        )

    def way_back(self, first: int, words: str = "") -> str:
        """Return how to branch from the newest checkpoint from before a step, from 1."""
        folder = self.parts.folder
        before = [step for step in folder.store.committed_steps() if step < first]
        if not before:
            return f"there is no checkpoint from before step {first}, so start a new run"
        return (
            f"the newest checkpoint from before is of step {before[-1]}:  interlace train --resume "
            f"{folder.path} --from-step {before[-1]} run.dir=NEW {words}".rstrip()
        )

    def gap_over(self, steps: Sequence[int]) -> str:
        """Return the setting that leaves out what steps, from 1, took, and what is left out now."""
        gaps = self.parts.batches.training.gaps
        first, last = (batch_of(step - 1, gaps) + 1 for step in (steps[0], steps[-1]))
        return f"data.skip_batches={gap_text(with_gap(gaps, first, last + 1))}"

    def report_bad_step(self, step: int, count: int, loss: float, norm: float) -> None:
        """Tell of a step that is not finite, before its update where there is one; stop the run
        when there were too many.
        """
        parts = self.parts
        engine, limit = parts.state.engine, parts.config.train.max_bad_steps
        outcome = "coordinates that are not count as 0" if engine.guards else "update skipped"
        self.console.note(
            f"step {step + 1}: loss {loss} or gradient norm {norm} is not finite; {outcome} "
            f"({count} in a row, {limit} stop the run)"
        )
        begun = engine.update_begun and not engine.guards
        if count < limit and not begun:
            return
        folder = save_evidence(parts.folder.path, step, parts.batches, parts.state)
        lower = f"optimizer.peak_lr={parts.config.optimizer.peak_lr}"
        if begun:
            raise NumericsError(
                f"step {step + 1}: loss {loss} or gradient norm {norm} is not finite, and "
                "offload.overlap=backward had begun the update. The evidence is in "
                f"{folder}; resume from the newest checkpoint, with a lower {lower} or with "
                "offload.overlap=forward, which skips such steps."
            )
        also = "" if engine.guards else " or turn on optimizer.clip"
        raise NumericsError(
            f"{count} steps in a row had a loss or gradient that is not finite "
            f"(train.max_bad_steps={limit}); "
            f"last loss {loss}, gradient norm {norm}. The evidence is in {folder}; the newest "
            f"checkpoint is untouched. Lower {lower}{also}, and resume. To see the first of them "
            f"again, in one process: {self.way_back(step + 2 - count, 'train.max_bad_steps=1')}"
        )


def advance(progress: Progress, tokens: int, *, skipped: bool) -> Progress:
    """Return the counters after one more step, whose update was skipped or not."""
    moved = {
        "step": progress.step + 1,
        "tokens": progress.tokens + tokens,
        "skipped_steps": progress.skipped_steps + skipped,
    }
    return progress.model_copy(update=moved)


def is_finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN."""
    return value - value == 0.0
