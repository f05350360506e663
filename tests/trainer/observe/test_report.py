"""The run report: what it makes of a plan and of traced updates."""

import json
from pathlib import Path

from interlace.trainer.observe.report import write_report


def test_nested_figures_of_a_plan_have_lines_of_their_own(tmp_path: Path) -> None:
    offload = {"overlap": "forward", "forecasts": [{"strategy": "host", "homes": {"host": 7}}]}
    plan = {"steps": 3, "offload": offload, "memory": {"device": {"weights": 12345}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>memory.device.weights</td><td>12,345</td>" in page
    assert "<td>offload.overlap</td><td>forward</td>" in page
    assert "<td>offload.forecasts.host.homes.host</td><td>7</td>" in page


def test_a_report_without_traced_updates_has_no_picture_of_them(tmp_path: Path) -> None:
    assert "<h2>Updates</h2>" not in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "timeline.png").write_bytes(b"\x89PNG")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<h2>Updates</h2><img alt="lanes of traced updates over time"' in page
