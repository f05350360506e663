"""Who waits for whom: a page for a person, made of the reports of all ranks.

The ranks that others wait for are those that are stopped, gone or silent; else those that have
entered fewer phases than the rest, since all ranks enter the same ones in the same order; else,
within one phase, those whose stack does not end in a call of torch.distributed.
"""

import re
from collections.abc import Sequence

from interlace.trainer.watchdog.reports import Report

STATES = {
    "stopped": "stopped by a signal (SIGSTOP)",
    "ended": "ended",
    "silent": "no answer: it has left, or its machine is gone",
}
INNERMOST = 3
SHOWN_FRAMES = 12
SHOWN_STACKS = 4
_FRAME = re.compile(r'File "(?:.*/site-packages/|.*/(?=interlace/))?(.*)", line (\d+) in (.*)')
_COLLECTIVES = "/torch/distributed/"


def culprits(reports: Sequence[Report]) -> list[Report]:
    """Return the ranks that the others wait for; none if all are alike."""
    unable = [report for report in reports if report.state in STATES]
    if unable:
        return unable
    least = min(report.marks for report in reports)
    behind = [report for report in reports if report.marks == least]
    if len(behind) < len(reports) or len(reports) == 1:
        return behind
    busy = [report for report in reports if not in_collective(report)]
    return busy if len(busy) < len(reports) else []


def is_stall(reports: Sequence[Report]) -> bool:
    """Whether the run has to be ended: not if those that others wait for are not late themselves,
    since they have a reason to take their time.
    """
    guilty = culprits(reports)
    return not guilty or any(each.late or each.state in STATES for each in guilty)


def in_collective(report: Report) -> bool:
    """Whether the innermost Python frame is one of torch.distributed."""
    return bool(report.stack) and _COLLECTIVES in report.stack[0]


def verdict(reports: Sequence[Report]) -> str:
    """Return in one or more sentences which ranks the others wait for."""
    guilty = culprits(reports)
    if not guilty:
        return (
            f"all ranks are {place(reports[0])} and wait for each other: "
            "the exchange itself hangs (network), or its partners do not match"
        )
    others = [report for report in reports if report not in guilty]
    subject = "the run" if len(reports) == 1 else None
    said = "; ".join(
        f"{subject or f'rank {each.rank}'} {stands(each, len(reports) > 1)}" for each in guilty
    )
    if not others:
        return said
    places: dict[str, list[int]] = {}
    for other in others:
        places.setdefault(place(other), []).append(other.rank)
    waits = "; ".join(
        f"{names(ranks)} {'wait' if len(ranks) > 1 else 'waits'} for "
        f"{'it' if len(guilty) == 1 else 'them'} {where}"
        for where, ranks in places.items()
    )
    return f"{said}; {waits}"


def stands(report: Report, of_several: bool) -> str:
    """Return what one rank has been doing, and for how long."""
    if report.state == "silent":
        return STATES["silent"]
    if report.state == "ended":
        return f"ended {place(report)}"
    state = f", {STATES[report.state]}" if report.state in STATES else ""
    on = f" on {report.host}" if of_several else ""
    return f"has been {place(report)} for {report.idle:.0f} s{on}{state}"


def place(report: Report) -> str:
    """Return the phase and step of a rank, as in `in forward of step 12`."""
    return f"in {report.phase} of step {report.step}" if report.step else f"in {report.phase}"


def names(ranks: Sequence[int]) -> str:
    """Return `rank 3` or `ranks 0, 2, 3`; of many, how many there are."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 16:
        return f"{len(ranks)} others, such as rank {ranks[0]},"
    return f"ranks {', '.join(map(str, ranks))}"


def page(reports: Sequence[Report], folder: str) -> str:
    """Return all that is printed: the verdict, a table of the ranks, their stacks.

    Args:
        reports: Of all ranks.
        folder: Where the whole stacks are.
    """
    late = [report.limit for report in reports if report.late or len(reports) == 1]
    # The machine of the rank that was late may be gone by now, and its report with it.
    longer = f", for longer than {min(late):.0f} s (watchdog.seconds)" if late else ""
    lines = [
        f"interlace: the run stands still{longer}",
        verdict(reports),
    ]
    if len(reports) > 1:
        lines += table(reports)
    lines += stacks(reports)
    lines.append(f"stacks of all threads: {folder}/rank-*.stacks")
    return "\n".join(lines)


def table(reports: Sequence[Report]) -> list[str]:
    """Return the lines of the table; of many ranks, the first of every phase and all culprits."""
    guilty = {report.rank for report in culprits(reports)}
    seen: set[str] = set()
    lines = ["  rank  phase          step    silent  process"]
    left_out = 0
    for report in reports:
        if len(reports) > 16 and report.rank not in guilty and place(report) in seen:
            left_out += 1
            continue
        seen.add(place(report))
        known = report.state not in ("silent", "ended")
        silent = f"{report.idle:.0f} s" if known else "-"
        lines.append(
            f"  {report.rank:>4}  {report.phase or '-':<13}  {report.step:>4}  {silent:>8}  "
            f"{STATES.get(report.state, report.state)}"
        )
    if left_out:
        lines.append(f"  {left_out} more ranks are where others are")
    return lines


def stacks(reports: Sequence[Report]) -> list[str]:
    """Return the stacks, equal ones once, those of culprits first."""
    guilty = {report.rank for report in culprits(reports)}
    groups: dict[tuple[str, ...], list[int]] = {}
    for report in sorted(reports, key=lambda each: (each.rank not in guilty, each.rank)):
        if report.state not in ("ended", "silent"):
            groups.setdefault(tuple(readable(report.stack)), []).append(report.rank)
    lines: list[str] = []
    for stack, ranks in list(groups.items())[:SHOWN_STACKS]:
        if not stack:
            lines.append(f"{names(ranks)}: no Python stack; a stopped process cannot show one")
            continue
        lines.append(f"{names(ranks)}, innermost call first:")
        lines += [f"    {frame}" for frame in stack]
    return lines


def readable(stack: Sequence[str]) -> list[str]:
    """Return the innermost frames and, of those further out, those of the trainer."""
    frames = [_FRAME.sub(r"\1:\2 \3", frame) for frame in stack]
    ours = [frame for frame in frames[INNERMOST:] if frame.startswith("interlace/trainer/")]
    return (frames[:INNERMOST] + ours)[:SHOWN_FRAMES]
