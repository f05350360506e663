"""A coordinate check as a picture: a row per module, a column per statistic, slopes as colours; and
how the sizes go with the width.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interlace.trainer.mup.check.verdict import Slope, Verdict
from interlace.trainer.observe.plots import BLUE, GREY, ORANGE, tidy, write_picture

COLUMNS = [
    (name, phase)
    for name in ("size", "change", "gradient", "update", "clipped")
    for phase in ("start", "late")
]
STEEPEST = 1.0
"""Slope at which colours end."""

NAMES_APART = 0.4
"""Octaves between the names of two lines."""

ROW_HEIGHT, LEAST_HEIGHT = 0.24, 4.0


def draw(verdict: Verdict, title: str, path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    found = {(each.module, each.statistic, each.phase): each for each in verdict.slopes}
    titles = verdict.modules
    columns = [column for column in COLUMNS if any((title, *column) in found for title in titles)]
    height = max(LEAST_HEIGHT, 2.0 + ROW_HEIGHT * len(titles))
    figure = Figure(figsize=(13.5, height), dpi=120, layout="constrained")
    word = "passes" if verdict.passes else f"fails: {verdict.at_fault}"
    figure.suptitle(f"{title}: {word}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    draw_map(left, found, titles, columns)
    draw_sizes(right, verdict)
    write_picture(figure, path)


def draw_map(
    axes: Any,
    found: dict[tuple[str, str, str], Slope],
    titles: Sequence[str],
    columns: Sequence[tuple[str, str]],
) -> None:
    """Draw slopes as coloured cells; those out of bounds have a frame and bold numbers."""
    from matplotlib.patches import Rectangle

    numbers = np.full((len(titles), len(columns)), np.nan)
    for row, title in enumerate(titles):
        for place, column in enumerate(columns):
            slope = found.get((title, *column))
            if slope is None:
                continue
            numbers[row, place] = slope.slope
            weight = "normal" if slope.passes else "bold"
            axes.text(
                place, row, f"{slope.slope:+.2f}", ha="center", va="center", fontsize=7,
                fontweight=weight,
            )  # fmt: skip
            if not slope.passes:
                frame = Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, lw=1.6, ec="black")
                axes.add_patch(frame)
    axes.imshow(numbers, cmap="RdBu_r", vmin=-STEEPEST, vmax=STEEPEST, aspect="auto", alpha=0.75)
    axes.set_yticks(range(len(titles)), titles, fontsize=7, family="monospace")
    heads = [f"{name}\n{phase}" for name, phase in columns]
    axes.set_xticks(range(len(columns)), heads, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("exponent of the width; framed: out of bounds", fontsize=9, loc="left")


def draw_sizes(axes: Any, verdict: Verdict) -> None:
    """Draw activations over the width; those that fail stand out."""
    late = [each for each in verdict.slopes if (each.statistic, each.phase) == ("size", "late")]
    for each in late:
        colour = GREY if each.passes else ORANGE
        sizes = np.asarray(each.sizes) / each.sizes[0]
        width = 1.0 if each.passes else 2.0
        axes.plot(verdict.widths, sizes, color=colour, linewidth=width, marker="o", markersize=3)
    named: list[float] = []
    for each in sorted(late, key=lambda each: (-abs(each.slope), -len(each.title))):
        height = math.log2(each.sizes[-1] / each.sizes[0])
        # Names of lines that lie on each other would too.
        if each.passes or any(abs(height - other) < NAMES_APART for other in named):
            continue
        named.append(height)
        axes.annotate(
            each.title, (verdict.widths[-1], 2.0**height), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=7, color=ORANGE,
        )  # fmt: skip
    axes.axhline(1.0, color=BLUE, linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(verdict.widths, [str(width) for width in verdict.widths])
    axes.set_xlabel("width")
    axes.set_ylabel("size of activations over that of the narrowest")
    axes.set_title("activations in the later steps, a line per module", fontsize=9, loc="left")
    tidy(axes)
