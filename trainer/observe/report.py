"""`report.html`: a run on one static page that needs no server and no network.

Everything is read from the run folder, so a report can be made of any run at any time; what is
missing is left out.
"""

import base64
import json
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.observe.metrics import METRICS_NAME, StepRecord, read_metrics
from interlace.trainer.observe.plots import (
    BLUE,
    GREEN,
    GREY,
    line_figure,
    loss_figure,
    picture,
)
from interlace.trainer.observe.traces import PICTURE_NAME
from interlace.trainer.observe.units import human_bytes, human_count, human_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
  color: #0f172a; background: #fff}
h1 {font-size: 1.6rem; margin: 0}
h2 {font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #e2e8f0}
.sub {color: #64748b; margin: .2rem 0 1.4rem}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem}
.card {border: 1px solid #e2e8f0; border-radius: 8px; padding: .7rem .9rem}
.card b {display: block; font-size: 1.25rem}
.card span {color: #64748b; font-size: .82rem}
img {max-width: 100%; background: #fff; border-radius: 8px}
.grid {display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem}
table {border-collapse: collapse; font-size: .87rem; width: 100%}
td {padding: .12rem .5rem; border-bottom: 1px solid #f1f5f9; vertical-align: top}
td:first-child {color: #64748b; width: 48%}
.set td {font-weight: 600; color: #1d4ed8}
pre {background: #f8fafc; border: 1px solid #e2e8f0; border-radius: 8px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem}
"""


def write_report(run_dir: Path) -> Path:
    """Write the report of a run folder and return its path."""
    records = read_metrics(run_dir / METRICS_NAME)
    plan = read_json(run_dir / "plan.json")
    sections = [
        headline(records, plan),
        "<h2>Loss</h2>" + image(loss_figure(records), "loss over steps") if records else "",
        small_pictures(records),
        updates(run_dir / PICTURE_NAME),
        samples(run_dir / "samples.txt"),
        configuration(run_dir / "config.toml"),
        listing("Plan", plan),
        listing("Environment", read_json(run_dir / "environment.json")),
    ]
    name = escape(run_dir.name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body><h1>{name}</h1>{''.join(sections)}</body></html>\n"
    )
    path = run_dir / "report.html"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object, or an empty one if the file is missing."""
    if not path.is_file():
        return {}
    return cast(dict[str, object], json.loads(path.read_text(encoding="utf-8")))


def headline(records: Sequence[StepRecord], plan: Mapping[str, object]) -> str:
    """The numbers that a reader wants first."""
    if not records:
        return '<p class="sub">No step has finished yet.</p>'
    last = records[-1]
    validated = [r for r in records if r.val_loss is not None]
    speeds = [r.tokens_per_second for r in records if r.tokens_per_second is not None]
    memory = [r.device_memory_bytes or r.host_memory_bytes or 0 for r in records]
    cards: dict[str, str] = {"training loss": f"{last.loss:.4f}" if last.loss is not None else "-"}
    if validated:
        cards["validation loss"] = f"{validated[-1].val_loss:.4f}"
        cards["bits per byte"] = f"{validated[-1].val_bits_per_byte:.4f}"
    cards |= {
        "tokens": human_count(last.tokens),
        "tokens per second (median)": human_count(median(speeds)) if speeds else "-",
        "MFU (median)": f"{100 * median([r.mfu or 0.0 for r in records]):.0f}%",
        "peak memory": human_bytes(max(memory)),
        "time in steps": human_duration(sum(r.step_seconds or 0.0 for r in records)),
        "skipped steps": str(sum(bool(r.skipped) for r in records)),
    }
    parameters = plan.get("parameters")
    size = f"{parameters:,} parameters, " if isinstance(parameters, int) else ""
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in cards.items()
    )
    steps = f"{last.step:,} of {plan.get('steps', '?')} steps"
    return f'<p class="sub">{size}{steps}</p><div class="cards">{shown}</div>'


def small_pictures(records: Sequence[StepRecord]) -> str:
    """Speed, memory and gradient norm."""
    if not records:
        return ""
    figures = {
        "Speed": line_figure(records, lambda r: r.tokens_per_second, "tokens per second", BLUE),
        "Memory": line_figure(
            records,
            lambda r: (r.device_memory_bytes or r.host_memory_bytes or 0) / 2**30,
            "GiB",
            GREEN,
        ),
        "Gradient norm": line_figure(
            records, lambda r: r.grad_norm, "2-norm before clipping", GREY
        ),
    }
    cells = "".join(
        f"<div><h2>{title}</h2>{image(figure, title)}</div>" for title, figure in figures.items()
    )
    return f'<div class="grid">{cells}</div>'


def updates(path: Path) -> str:
    """The lanes of traced updates."""
    if not path.is_file():
        return ""
    return "<h2>Updates</h2>" + inline(path.read_bytes(), "lanes of traced updates over time")


def image(figure: "Figure", description: str) -> str:
    """Return a figure as an inline picture."""
    return inline(picture(figure), description)


def inline(png: bytes, description: str) -> str:
    """Return a picture as a part of the page."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def samples(path: Path) -> str:
    """The texts that the model wrote."""
    if not path.is_file():
        return ""
    return f"<h2>Samples</h2><pre>{escape(path.read_text(encoding='utf-8'))}</pre>"


def configuration(path: Path) -> str:
    """Every setting by section; what differs from the defaults stands out."""
    if not path.is_file():
        return ""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    defaults = RunConfig().model_dump(mode="json")
    parts: list[str] = []
    for section, values in tables.items():
        rows = "".join(
            row(key, value, changed=defaults.get(section, {}).get(key) != value)
            for key, value in values.items()
        )
        parts.append(f"<div><h2>[{escape(section)}]</h2><table>{rows}</table></div>")
    return (
        '<h2>Configuration</h2><p class="sub">Values that differ from the defaults are blue.</p>'
        f'<div class="grid">{"".join(parts)}</div>'
    )


def listing(title: str, values: Mapping[str, object]) -> str:
    """A table of names and values."""
    if not values:
        return ""
    rows = "".join(row(key, value, changed=False) for key, value in flat(values).items())
    return f"<h2>{escape(title)}</h2><table>{rows}</table>"


def flat(values: Mapping[str, object]) -> dict[str, object]:
    """Return nested values by dotted names; of strategies side by side, each by its own."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            nested = cast(dict[str, object], value)
        elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            parts = cast(list[dict[str, object]], value)
            nested = {str(part.get("strategy", n)): part for n, part in enumerate(parts)}
        else:
            found[key] = value
            continue
        found |= {f"{key}.{name}": inner for name, inner in flat(nested).items()}
    return found


def row(key: str, value: object, changed: bool) -> str:
    """One line of a table."""
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    mark = ' class="set"' if changed else ""
    return f"<tr{mark}><td>{escape(key)}</td><td>{escape(shown)}</td></tr>"
