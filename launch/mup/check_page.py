"""The page of a coordinate check: a line per module, a column per statistic, and the verdict."""

from collections.abc import Sequence

from interlace.launch.typeset import typeset
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.mup.check.running import Request
from interlace.trainer.mup.check.verdict import Slope, Verdict

STATISTICS = ("size", "change", "gradient", "update", "clipped")
SHOWN = 8


def check_page(config: RunConfig, request: Request, verdict: Verdict, notes: Sequence[str]) -> str:
    """Return the whole page."""
    what = "standard parametrisation" if request.standard else "muP"
    left_out = f" without {', '.join(request.without)}" if request.without else ""
    widths = ", ".join(str(width) for width in verdict.widths)
    head = [
        f"Coordinate check of {config.run.name}: {config.optimizer.rule} under {what}{left_out}",
        f"widths {widths} from base {request.base_width}; {request.seeds} seeds; {request.steps} "
        f"steps at lr {request.lr:g}",
        *notes,
        "",
        "exponents of the width: at the start, and over the second half of the steps",
        "",
    ]
    lines = [*head, *slope_table(verdict), "", *conclusion(verdict)]
    return "\n".join(lines)


def slope_table(verdict: Verdict) -> list[str]:
    """Return a line per module; what is out of bounds is marked."""
    found = {(each.module, each.statistic, each.phase): each for each in verdict.slopes}
    present = [
        (name, phase)
        for name in STATISTICS
        for phase in ("start", "late")
        if any((each.statistic, each.phase) == (name, phase) for each in verdict.slopes)
    ]
    head = ["", *(f"{name} {phase}" for name, phase in present)]
    rows = [
        [module, *(cell(found.get((module, *column))) for column in present)]
        for module in verdict.modules
    ]
    return typeset(head, rows)


def cell(slope: Slope | None) -> str:
    """Return a slope in a few letters."""
    if slope is None:
        return ""
    return f"{slope.slope:+.2f}{' ' if slope.passes else '!'}"


def conclusion(verdict: Verdict) -> list[str]:
    """Return the verdict in words."""
    if verdict.passes:
        worst = max(verdict.slopes, key=lambda slope: abs(slope.slope) if slope.lowest > -9 else 0)
        return [
            f"PASSES: all {len(verdict.slopes)} slopes are within their bounds; the steepest that "
            f"is bounded on both sides is {worst.slope:+.2f} ({worst.title}, {worst.statistic})"
        ]
    lines = [f"FAILS: the first cause is {verdict.at_fault}"] if verdict.at_fault else ["FAILS"]
    lines += [f"    {spoken(slope)}" for slope in verdict.failures[:SHOWN]]
    if len(verdict.failures) > SHOWN:
        lines.append(f"    and {len(verdict.failures) - SHOWN} more, in check.json")
    if verdict.ended_early:
        widths = ", ".join(str(width) for width in verdict.ended_early)
        lines.append(f"    at width {widths} a step was not finite; try a smaller --lr")
    return lines


def spoken(slope: Slope) -> str:
    """Return one slope that is out of bounds, in words."""
    when = "at the start" if slope.phase == "start" else "over the later steps"
    goes = f"goes as width^{slope.slope:+.2f}"
    bounds = (
        f"at most {slope.highest:+.2f}"
        if slope.slope > slope.highest
        else f"at least {slope.lowest:+.2f}"
    )
    return f"{slope.title}: its {slope.statistic} {when} {goes}; may be {bounds}"
