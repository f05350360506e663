"""Checks of the `[data]` table that need more than the schema; each returns None or one message
with key, value, reason and remedy, as those in `checks`.
"""

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.gaps import parse_gaps


def gaps_go_forward(config: RunConfig) -> str | None:
    """Gaps are not empty, come in order, and do not overlap."""
    text, before = config.data.skip_batches, 1
    for first, last in parse_gaps(text):
        if not before <= first < last:
            return (
                f"data.skip_batches={text}: {first}:{last} holds no batch, or begins before "
                f"batch {before}; type spans as first:last, from 1, in order, such as "
                f"data.skip_batches={max(first, before)}:{max(first, before) + 200}"
            )
        before = last
    return None


def branch_has_its_step(config: RunConfig) -> str | None:
    """A branch begins at a step of a run."""
    run = config.run
    if bool(run.branch_of) == bool(run.branch_step):
        return None
    if run.branch_of:
        return (
            f"run.branch_of={run.branch_of}: which of its checkpoints does this run go on from? "
            "Type run.branch_step=STEP as well"
        )
    return (
        f"run.branch_step={run.branch_step}: of which run? Type run.branch_of=RUN as well, or "
        "run.branch_step=0"
    )
