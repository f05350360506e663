"""The script of the guide to DeepSpeed trains, as it stands there."""

import re
from pathlib import Path

import pytest
from ranks import run_on_ranks

# What nothing here uses, and DeepSpeed would compile for minutes: see docs/deepspeed.md.
UNUSED = """import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""
GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")


def test_the_script_of_the_guide_runs_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [script] = re.findall(r"^```python train_zero\.py\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = run_on_ranks(UNUSED + script, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "not attached" not in done.stderr
    assert "homes ['host']" in done.stdout
    assert re.search(r"^update 20: measured ", done.stdout, re.MULTILINE)
    assert (tmp_path / "zero-checkpoints" / "latest").is_file()
