"""The training loop: `train(config, world)` is the one entry, whoever starts it.

The command line, torchrun and every other launcher end here. Each line of the loop is a step of the
algorithm; the machinery behind it is in `interlace.trainer.run`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.assembly import open_run
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.memory_short import memory_in_words
from interlace.trainer.run import Run
from interlace.trainer.signals import StopRequest
from interlace.trainer.supervision import Supervision
from interlace.trainer.world import World


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        run_dir: The run folder.
        step: Finished steps.
        finished: Whether all steps of the recipe are done; if not, a signal asked to stop.
        validation_loss: Nats per token of the last validation, where there was one.
    """

    run_dir: Path
    step: int
    finished: bool
    validation_loss: float | None


def train(
    config: RunConfig,
    world: World,
    *,
    stop: StopRequest | None = None,
    on_commit: Callable[[int], None] | None = None,
) -> Outcome:
    """Train a model as a recipe says, from the start or from the newest checkpoint of its run
    folder.

    Args:
        config: The recipe, checked.
        world: The ranks that take part; every one of them calls this.
        stop: Through which the caller may ask to stop, from another thread.
        on_commit: Called on every rank with the step of each checkpoint once it is committed.

    Raises:
        UserError: Whatever a person can mend, before the first step where that is possible.
    """
    supervision = Supervision(config, world)
    opened = open_run(config, world, stop, supervision.begin)
    with supervision, memory_in_words(config, world), opened as run:
        run.saving.on_commit = on_commit
        for _ in finished_steps(run):
            if run.stop_requested:
                break
        run.conclude()
        return outcome_of(run)


def finished_steps(run: Run) -> Iterator[int]:
    """Take the remaining steps one by one; yield the number, from 0, of each when it is done."""
    for step in run.remaining_steps():
        batch_loss = run.forward_backward(step)
        gradient_norm = run.gradient_norm()
        run.diagnose(step)
        run.update_or_skip(step, batch_loss, gradient_norm)
        run.validate_if_due()
        run.observe()
        run.checkpoint_if_due()
        yield step


def outcome_of(run: Run) -> Outcome:
    """Return how a run ended."""
    progress = run.progress
    finished = progress.step == run.plan.steps
    return Outcome(run.folder.path, progress.step, finished, run.last_validation_loss)
