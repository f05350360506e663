"""The verdict of a sweep as a page of text: one table per family of widths."""

import math
from collections.abc import Sequence

from interlace.launch.sweep.conducting import State
from interlace.launch.sweep.judging import Judged, against_standard
from interlace.launch.sweep.progress import power
from interlace.launch.typeset import typeset
from interlace.trainer.mup.transfer import (
    CONTROL_DRIFT,
    DRIFT_LIMIT,
    Optimum,
    Regret,
    Transfer,
    Valley,
    loss_above,
    transferred_rate,
)

NAMES = {"mup": "muP", "standard": "standard parametrisation"}


def sweep_page(state: State, verdicts: Sequence[Judged]) -> str:
    """Return the page."""
    request, found = state.space.request, len(state.results) - state.fresh
    widths = ", ".join(map(str, request.widths))
    head = (
        f"{request.recipe}: widths {widths}, {request.seeds} seeds, learning rates at width "
        f"{state.space.base_width}; {len(state.results)} trials, {found} of them from the store"
    )
    parts = ["\n".join([head, *state.space.notes]), *(family_page(each) for each in verdicts)]
    parts += [
        " ".join(["muP's loss at its own optimum, at the widest width:", *each.family.settings])
        + f" {abs(above):.4f} {'above' if above > 0 else 'below'} the standard one's"
        for each, above in against_standard(verdicts)
    ]
    if state.failures:
        crashes = [f"{len(state.failures)} trials crashed; they run again when the sweep does:"]
        parts.append("\n".join([*crashes, *state.failures.values()]))
    return "\n\n".join(parts)


def family_page(each: Judged) -> str:
    """Return table and verdict of one family."""
    title = "  ".join([NAMES[each.family.parametrisation], *each.family.settings])
    if each.transfer is None:
        return f"{title}\nverdict: {each.verdict}"
    return "\n".join(
        [
            title,
            *optimum_table(each.valleys, each.transfer),
            *sentences(each.transfer, each.family.parametrisation == "standard"),
            f"verdict: {each.verdict}",
        ]
    )


def optimum_table(valleys: Sequence[Valley], transfer: Transfer) -> list[str]:
    """Return one line per width: optimum, interval, loss, and what transferring costs."""
    taken = transferred_rate(valleys[0].means)
    at = power(round(taken, 2)) if taken is not None else "none"
    clipped = any(optimum.clip_fraction is not None for optimum in transfer.optima)
    head = ["width", "best lr", "95% over seeds", "loss", "± seeds", f"loss at {at}", "regret"]
    head += ["allowed", *(["clipped"] if clipped else [])]
    regrets = {regret.width: regret for regret in transfer.regrets}
    rows: list[list[str]] = []
    for valley, optimum in zip(valleys, transfer.optima, strict=True):
        above = loss_above(valley.means, taken) if taken is not None else None
        there = None if above is None else optimum.loss + above
        row = [str(valley.width), *optimum_cells(optimum), number(there)]
        row += regret_cells(regrets.get(valley.width))
        rows.append(row + ([share(optimum.clip_fraction)] if clipped else []))
    return typeset(head, rows, left=())


def optimum_cells(optimum: Optimum) -> list[str]:
    """Return optimum, interval, loss and spread of one width."""
    best = power(round(optimum.log2_lr, 2)) if optimum.log2_lr is not None else "not bracketed"
    interval = "" if optimum.low is None else f"{power(round(optimum.low, 2))} .. "
    interval += "" if optimum.high is None else power(round(optimum.high, 2))
    return [best, interval, number(optimum.loss), f"{optimum.spread:.4f}"]


def regret_cells(regret: Regret | None) -> list[str]:
    """Return what transferring costs and what it may."""
    if regret is None:
        return ["", ""]
    return [share(regret.relative, 2), share(regret.allowed, 2)]


def number(loss: float | None) -> str:
    """Return a loss in nats."""
    if loss is None:
        return ""
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def share(value: float | None, digits: int = 0) -> str:
    """Return a share in percent."""
    if value is None:
        return ""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "diverged"


def signed(octaves: float) -> str:
    """Return octaves with their sign; nothing is not less than nothing."""
    return f"{round(octaves, 2) + 0.0:+.2f}"


def passing(passes: bool) -> str:
    """Return the word for a limit that is kept or not."""
    return "passes" if passes else "FAILS"


def sentences(transfer: Transfer, control: bool) -> list[str]:
    """Return drift, regret and the order of widths in words."""
    lines: list[str] = []
    if transfer.drift is not None:
        low, high = transfer.drift_low, transfer.drift_high
        ends = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
        limit = f"at most {DRIFT_LIMIT:g} either way: {passing(transfer.drift_passes)}"
        if control:
            limit = (
                f"a control has {CONTROL_DRIFT:g} or less: {'yes' if transfer.is_control else 'no'}"
            )
        lines.append(
            f"drift {signed(transfer.drift)} octaves per doubling of the width{ends}, {limit}"
        )
    if transfer.regrets:
        worst = max(transfer.regrets, key=lambda regret: regret.relative - regret.allowed)
        text = f"regret at width {worst.width}: {share(worst.relative, 2)}"
        lines.append(
            f"{text}, allowed {share(worst.allowed, 2)}: {passing(transfer.regret_passes)}"
        )
    if transfer.wider_is_better is not None:
        answer = "yes" if transfer.wider_is_better else "no"
        lines.append(f"wider is better at the transferred learning rate: {answer}")
    return lines
