"""The table of faults in docs/reliability.md, and the file it is made from."""

import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


class Try(NamedTuple):
    """One fault and how the run recovered: the id of the acceptance plan, steps that had to be
    taken again, seconds from the fault to the first new step.
    """

    plan: str
    lost_steps: int
    recovery_seconds: float


def update(root: Path, tries: Mapping[str, Sequence[Try]]) -> None:
    """Replace the rows of the faults that were tried, in the results and in the guide."""
    if not tries:
        return
    results = benchmark_results(root)
    path = root / "benchmarks" / "results" / "faults.json"
    rows: dict[str, Any] = {}
    if path.is_file():
        rows = {row["fault"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    here = results.machine()
    for fault, measured in tries.items():
        rows[fault] = {
            "fault": fault,
            "plan": measured[0].plan,
            "lost_steps": [one.lost_steps for one in measured],
            "recovery_seconds": [round(one.recovery_seconds, 2) for one in measured],
            "date": here["date"],
        }
    ordered = sorted(rows.values(), key=lambda row: (row["plan"], row["fault"]))
    document = {"machine": here, "rows": ordered}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in here.items())
    shown = results.table([table_row(row) for row in ordered])
    guide = root / "docs" / "reliability.md"
    replace_block(guide, BEGIN, END, f"{shown}\n\nLast run: {facts}.")


def table_row(row: Mapping[str, Any]) -> dict[str, object]:
    """Return one line of the table."""
    lost, seconds = row["lost_steps"], row["recovery_seconds"]
    return {
        "plan": row["plan"],
        "fault": row["fault"],
        "times tried": len(lost),
        "lost steps (median, worst)": f"{statistics.median(lost):g}, {max(lost)}",
        "recovery seconds (median, worst)": f"{statistics.median(seconds):.1f}, {max(seconds):.1f}",
        "measured": row["date"],
    }


def replace_block(path: Path, begin: str, end: str, text: str) -> None:
    """Write `text` between two comments of a file."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{path} has no block {begin} ... {end}"
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def benchmark_results(root: Path) -> Any:
    """Load benchmarks/results.py, which says what a machine is and sets tables."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_results", root / "benchmarks" / "results.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
