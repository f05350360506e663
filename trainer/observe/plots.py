"""Pictures of a run, drawn without a display or global state."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from interlace.trainer.observe.metrics import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN = "#2563eb", "#ea580c", "#94a3b8", "#059669"
SMOOTHING = 0.9


def write_loss_curve(records: Sequence[StepRecord], path: Path) -> None:
    """Write `loss.png`: training loss, smoothed and raw, held-out loss, and the learning rate
    below.
    """
    write_picture(loss_figure(records), path)


def loss_figure(records: Sequence[StepRecord]) -> "Figure":
    """Draw the loss curve (nats per token over steps)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    train = [(r.step, r.loss) for r in records if r.loss is not None and r.loss - r.loss == 0.0]
    held_out = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    steps, losses = [s for s, _ in train], [v for _, v in train]
    upper.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1, label="training, every step")
    upper.plot(steps, smoothed(losses), color=BLUE, linewidth=2, label="training, smoothed")
    if held_out:
        upper.plot(
            *zip(*held_out, strict=True), "o-", color=ORANGE, linewidth=2, label="validation"
        )
        step, value = held_out[-1]
        upper.annotate(
            f"{value:.3f}",
            (step, value),
            (-6, 10),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
        )
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title(records), loc="left", fontsize=11)
    upper.legend(frameon=False, loc="upper right")
    draw_line(lower, records, lambda r: r.lr, GREY)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        tidy(axes)
    return figure


def title(records: Sequence[StepRecord]) -> str:
    """Say how far the run is."""
    if not records:
        return "no steps yet"
    bits = [r.val_bits_per_byte for r in records if r.val_bits_per_byte is not None]
    ending = f", {bits[-1]:.3f} bits per byte held out" if bits else ""
    return f"{records[-1].step:,} steps, {records[-1].tokens:,} tokens{ending}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential moving average."""
    averages: list[float] = []
    total = weight = 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        averages.append(total / weight)
    return averages


def line_figure(
    records: Sequence[StepRecord],
    value: Callable[[StepRecord], float | None],
    label: str,
    color: str,
) -> "Figure":
    """Draw one quantity over the steps, from zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    draw_line(axes, records, value, color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    tidy(axes)
    return figure


def draw_line(
    axes: "Axes",
    records: Sequence[StepRecord],
    value: Callable[[StepRecord], float | None],
    color: str,
) -> None:
    """Plot the finite values of one quantity."""
    points = [(r.step, v) for r in records if (v := value(r)) is not None and v - v == 0.0]
    marker = "." if len(points) < 3 else None
    axes.plot(
        [s for s, _ in points], [v for _, v in points], marker=marker, color=color, linewidth=1.5
    )


def tidy(axes: "Axes") -> None:
    """Keep ink for data."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_picture(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the file's name, so that a reader sees all of it or the old
    one.
    """
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(picture(figure, path.suffix.removeprefix(".").lower()))
    temporary.replace(path)


def picture(figure: "Figure", kind: str = "png") -> bytes:
    """Return a figure as the bytes of an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
