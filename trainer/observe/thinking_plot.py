"""The picture of what an energy-based model gains by thinking."""

from pathlib import Path

from interlace.trainer.observe.plots import BLUE, GREEN, GREY, ORANGE, tidy, write_picture
from interlace.trainer.thinking import Thought


def write_thinking(thought: Thought, path: Path) -> None:
    """Draw loss over steps for each number of samples, loss over samples, and loss over energy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    longer, wider, ranked = figure.subplots(1, 3)
    steps = range(1, len(thought.random) + 1)
    for number, (count, losses) in enumerate(zip(thought.counts, thought.chosen, strict=True)):
        label = "one descent" if count == 1 else f"best of {count} by energy"
        fade = 0.35 + 0.65 * (number + 1) / len(thought.counts)
        longer.plot(steps, losses, "o-", color=BLUE, alpha=fade, markersize=3, label=label)
    longer.axvline(thought.trained_steps, color=GREY, linestyle=":", label="steps in training")
    longer.set(xlabel="steps of descent", ylabel="loss (nats per token)", title="Thinking longer")
    wider.plot(
        thought.counts,
        [losses[-1] for losses in thought.chosen],
        "o-",
        color=BLUE,
        label="by energy",
    )
    wider.axhline(thought.random[-1], color=GREY, linestyle="--", label="at random")
    wider.plot(thought.counts, thought.known, "o-", color=GREEN, label="by the answer")
    wider.set_xscale("log", base=2)
    wider.set_xticks(thought.counts, [str(count) for count in thought.counts])
    wider.set(xlabel="descents to choose from", title="Choosing the best")
    ranked.plot(thought.energies, thought.errors, "o-", color=ORANGE, markersize=4)
    ranked.set(xlabel="energy (means of equal groups)", title="Energy against error")
    ranked.annotate(
        f"rank correlation {thought.rank_correlation:+.2f}",
        (0.03, 0.94),
        xycoords="axes fraction",
        va="top",
    )
    longer.xaxis.get_major_locator().set_params(integer=True)
    ranked.locator_params(axis="x", nbins=5)
    for axes in (longer, wider, ranked):
        tidy(axes)
        axes.ticklabel_format(axis="y", useOffset=False)
    for axes in (longer, wider):
        axes.legend(frameon=False, fontsize=8)
    write_picture(figure, path)
