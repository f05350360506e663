"""The benchmark of long contexts as a picture: times, memory, and where the time goes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interlace.launch.longctx.comparison import interval
from interlace.launch.longctx.measuring import Sample
from interlace.launch.longctx.operators import KINDS
from interlace.trainer.observe.units import human_bytes, human_seconds

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f2a541", "#72b7b2")
KIND_COLOURS = ("#e45756", "#f2a541", "#4c78a8", "#bab0ac")


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Write the picture, in the format that the name ends in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    names = list(dict.fromkeys(sample.name for sample in samples))
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        mine = sorted((each for each in samples if each.name == name), key=lambda s: s.length)
        draw_times(axes[0][0], mine, lambda s: s.prefill.seconds, colour)
        draw_times(axes[0][1], mine, lambda s: s.decode.seconds, colour)
        draw_memory(axes[1][0], mine, colour)
    lengths = sorted({sample.length for sample in samples})
    for axis, title in (
        (axes[0][0], "Time to the first token"),
        (axes[0][1], "Time per token after it"),
        (axes[1][0], "Memory of the prefill (dotted: with all logits)"),
    ):
        axis.set_title(title, loc="left", fontsize=11)
        logarithmic(axis, lengths)
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _: human_seconds(value))
    axes[1][0].yaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes[0][0].legend(frameon=False, fontsize=9)
    draw_shares(axes[1][1], samples, lengths[-1])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def short(name: str) -> str:
    """Return a recipe's name, or the last part of a folder's."""
    return Path(name).name


def draw_times(
    axis: Any, mine: Sequence[Sample], seconds: Callable[[Sample], list[float]], colour: str
) -> None:
    """Medians as a line, their intervals as a band."""
    lengths = [each.length for each in mine]
    found = [interval(seconds(each)) for each in mine]
    label = short(mine[0].name)
    axis.plot(lengths, [f.middle for f in found], "o-", color=colour, label=label, ms=4)
    low, high = [f.low for f in found], [f.high for f in found]
    axis.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_memory(axis: Any, mine: Sequence[Sample], colour: str) -> None:
    """Peaks of the prefill, with the last logits and with all."""
    axis.plot(
        [each.length for each in mine],
        [each.prefill.memory.total for each in mine],
        "o-",
        color=colour,
        ms=4,
    )
    full = [(each.length, each.full_logits.total) for each in mine if each.full_logits]
    axis.plot([length for length, _ in full], [peak for _, peak in full], ":", color=colour)
    axis.set_yscale("log", base=2)


def logarithmic(axis: Any, lengths: Sequence[int]) -> None:
    """Lengths on a logarithmic axis that names them; plain lines around."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens of the prompt")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_shares(axis: Any, samples: Sequence[Sample], length: int) -> None:
    """Stacked bars at the longest length: prefill and decoding of each model."""
    bars = [
        (f"{short(each.name)}\n{title}", part.shares)
        for each in samples
        if each.length == length
        for title, part in (("prefill", each.prefill), ("decoding", each.decode))
    ][::-1]
    left = [0.0] * len(bars)
    for kind, colour in zip(KINDS, KIND_COLOURS, strict=True):
        widths = [100 * shares[kind] for _, shares in bars]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=kind, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.set_xlim(0, 100)
    axis.set_xlabel("percent of the time")
    axis.set_title(f"Where the time goes at {length:,} tokens", loc="left", fontsize=11, pad=24)
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
