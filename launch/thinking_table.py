"""`interlace think` as text: loss by steps and samples, and whether energy knows the error."""

from interlace.launch.typeset import typeset
from interlace.trainer.thinking import Thought


def thinking_table(thought: Thought) -> str:
    """Return the page that `interlace think` prints."""
    head = ["steps", *(column(count) for count in thought.counts), "at random"]
    rows = [
        [
            mark(step, thought),
            *(f"{losses[step - 1]:.4f}" for losses in thought.chosen),
            f"{mean:.4f}",
        ]
        for step, mean in enumerate(thought.random, start=1)
    ]
    known = ["by answer", *(f"{loss:.4f}" for loss in thought.known), ""]
    lines = [
        f"loss in nats per token over {thought.positions:,} held-out positions; > marks the steps "
        "of training",
        "",
        *typeset(head, [*rows, known], left=()),
        "",
        f"energy against error: rank correlation {thought.rank_correlation:+.3f} (1: the lower the "
        "energy, the lower the loss)",
    ]
    if thought.better_than_random is not None:
        lines.append(
            f"the lowest energy of {thought.counts[-1]} beats their mean at "
            f"{thought.better_than_random:.1%} of positions"
        )
    return "\n".join(lines)


def column(count: int) -> str:
    """Return the title of a number of samples."""
    return "one" if count == 1 else f"best of {count}"


def mark(step: int, thought: Thought) -> str:
    """Return a step's number, marked if it is the last of training."""
    return f"> {step}" if step == thought.trained_steps else str(step)
