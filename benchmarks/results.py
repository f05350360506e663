"""How benchmarks keep what they measured: one JSON file and one Markdown table each, with machine,
versions and date.
"""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, object]


def machine() -> dict[str, object]:
    """Return what the figures were taken on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; the columns are the keys of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[n]) for line in cells)) for n, column in enumerate(columns)
    ]

    def line(words: Sequence[str]) -> str:
        padded = (word.ljust(width) for word, width in zip(words, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(columns), rule, *(line(words) for words in cells)])


def shown(value: object) -> str:
    """Return a number with three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(name: str, title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Write `results/<name>.json` and `results/<name>.md`."""
    RESULTS.mkdir(exist_ok=True)
    here = machine()
    document = {"machine": here, "rows": [dict(row) for row in rows], "notes": list(notes)}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in here.items())
    lines = [f"# {title}", "", facts, "", table(rows), *(f"\n{note}" for note in notes)]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
