"""A sweep as a picture: the valleys of every family side by side, and where their optima lie."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.launch.sweep.judging import Judged
from interlace.launch.sweep.page import NAMES, signed
from interlace.trainer.mup.transfer import Optimum, Valley
from interlace.trainer.observe.plots import BLUE, GREY, ORANGE, tidy, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADROOM = 0.16
"""Share above the best loss of the worst width at which the picture ends."""

SIZE, LOWER = (5.4, 4.4), 2.6
FAMILY_COLOURS = {"mup": BLUE, "standard": ORANGE}


def draw(verdicts: Sequence[Judged], title: str, path: Path) -> None:
    """Write the picture as PNG; families without a single finished point are left out."""
    from matplotlib.figure import Figure

    drawn = [each for each in verdicts if each.transfer is not None]
    if not drawn:
        return
    columns = len({each.family.parametrisation for each in drawn})
    rows = math.ceil(len(drawn) / columns)
    size = (max(SIZE[0] * columns, 7.0), SIZE[1] * rows + LOWER)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    heights = [SIZE[1]] * rows + [LOWER]
    grid: Any = figure.add_gridspec(rows + 1, columns, height_ratios=heights)
    first: Axes | None = None
    widths = sorted({valley.width for each in drawn for valley in each.valleys})
    for number, each in enumerate(drawn):
        place = grid[number // columns, number % columns]
        axes = figure.add_subplot(place, sharex=first, sharey=first)
        first = first or axes
        draw_family(axes, each, widths)
        if number % columns == 0:
            axes.set_ylabel("held-out loss (nats per token)")
    assert first is not None, "something is drawn"
    name_widths(figure, widths)
    bounds(first, drawn)
    draw_optima(figure.add_subplot(grid[rows, :]), drawn, widths)
    write_picture(figure, path)


def name_widths(figure: "Figure", widths: Sequence[int]) -> None:
    """Say at the top which colour is which width, once for all curves."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour_of(width, widths), linewidth=2.5, label=f"width {width}")
        for width in widths
    ]
    figure.legend(handles=lines, loc="outside upper right", ncols=len(lines), frameon=False)


def colour_of(width: int, widths: Sequence[int]) -> Any:
    """Return the colour of a width: the wider, the darker."""
    from matplotlib import colormaps

    place = widths.index(width) / max(1, len(widths) - 1)
    return colormaps["viridis_r"](0.12 + 0.82 * place)


def draw_family(axes: "Axes", each: Judged, widths: Sequence[int]) -> None:
    """Draw a curve per width, the spread of its seeds, and its optimum."""
    from matplotlib.ticker import MaxNLocator

    assert each.transfer is not None, "families without points are left out"
    for valley, optimum in zip(each.valleys, each.transfer.optima, strict=True):
        draw_valley(axes, valley, optimum, colour_of(valley.width, widths))
    words = ["  ".join([NAMES[each.family.parametrisation], *each.family.settings])]
    if each.transfer.drift is not None:
        words.append(f"drift {signed(each.transfer.drift)} octaves per doubling of the width")
    elif not each.bracketed:
        words.append(each.verdict)
    axes.set_title("\n".join(words), loc="left", fontsize=10)
    axes.set_xlabel("learning rate")
    axes.xaxis.set_major_formatter(power_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def power_label(value: float, _: object) -> str:
    """Return a power of two as mathematics has it."""
    return f"$2^{{{value:g}}}$".replace("-", "\N{MINUS SIGN}")


def draw_valley(axes: "Axes", valley: Valley, optimum: Optimum, colour: Any) -> None:
    """Draw one width: means as a line, lowest and highest seed as a band, each seed as a dot."""
    finite = [(rate, mean) for rate, mean in valley.means.items() if math.isfinite(mean)]
    rates = [rate for rate, _ in finite]
    axes.plot(
        rates, [mean for _, mean in finite], color=colour, linewidth=1.8, label=str(valley.width)
    )
    low = [min(valley.losses[rate]) for rate in rates]
    high = [max(valley.losses[rate]) for rate in rates]
    axes.fill_between(rates, low, high, color=colour, alpha=0.18, linewidth=0)
    dots = [(rate, loss) for rate in rates for loss in valley.losses[rate]]
    axes.plot(*zip(*dots, strict=True), ".", color=colour, ms=3.5, alpha=0.7) if dots else None
    for rate, mean in valley.means.items():
        if not math.isfinite(mean):
            crossed = axes.get_xaxis_transform()
            axes.plot([rate], [0.98], "x", color=colour, ms=6, transform=crossed, clip_on=False)
    if optimum.log2_lr is not None:
        mark(axes, optimum.log2_lr, finite, colour)


def mark(axes: "Axes", log2_lr: float, curve: Sequence[tuple[float, float]], colour: Any) -> None:
    """Mark an optimum on its curve, with a line down to the axis."""
    import numpy as np

    rates, losses = [rate for rate, _ in curve], [loss for _, loss in curve]
    height = float(np.interp(log2_lr, rates, losses))
    axes.vlines(log2_lr, 0, height, color=colour, linewidth=1, linestyle=":", zorder=0)
    axes.plot([log2_lr], [height], "D", color=colour, ms=8, mec="white", mew=1.4, zorder=5)


def bounds(axes: "Axes", drawn: Sequence[Judged]) -> None:
    """Let the picture end a little above the best loss of the worst width: slopes need no room."""
    best = [
        optimum.loss
        for each in drawn
        if each.transfer
        for optimum in each.transfer.optima
        if math.isfinite(optimum.loss)
    ]
    if not best:
        return
    low, high = min(best), max(best)
    axes.set_ylim(low - 0.25 * (HEADROOM * high), high * (1 + HEADROOM))


def draw_optima(axes: "Axes", drawn: Sequence[Judged], widths: Sequence[int]) -> None:
    """Draw the optimum over the width, a line per family, with intervals over seeds."""
    from matplotlib.ticker import MaxNLocator

    styles = ("-", "--", ":", "-.")
    combinations = list(dict.fromkeys(each.family.settings for each in drawn))
    for each in drawn:
        assert each.transfer is not None, "families without points are left out"
        known = [o for o in each.transfer.optima if o.log2_lr is not None]
        centres = [o.log2_lr for o in known if o.log2_lr is not None]
        ends = [
            (
                0.0 if o.low is None else max(0.0, c - o.low),
                0.0 if o.high is None else max(0.0, o.high - c),
            )
            for o, c in zip(known, centres, strict=True)
        ]
        axes.errorbar(
            [o.width for o in known],
            centres,
            yerr=list(zip(*ends, strict=True)) if ends else None,
            fmt="o",
            ms=5,
            linewidth=1.6,
            linestyle=styles[combinations.index(each.family.settings) % len(styles)],
            capsize=3,
            color=FAMILY_COLOURS.get(each.family.parametrisation, GREY),
            label="  ".join([NAMES[each.family.parametrisation], *each.family.settings]),
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_xlabel("width")
    axes.set_ylabel("best learning rate")
    axes.yaxis.set_major_formatter(power_label)
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    reach = max(1.0, (high - low) / 2)
    axes.set_ylim(middle - reach, middle + reach)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)
