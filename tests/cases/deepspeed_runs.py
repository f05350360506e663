"""Scripts that show on two ranks what `deepspeed_cases` can; this module loads no DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from ranks import run_on_ranks

CASES = Path(__file__).resolve().parent

HEAD = f"""
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, {str(CASES)!r})
from dataclasses import replace
from deepspeed_cases import *

HALF = {{"fp16": {{"initial_scale_power": 16, "loss_scale_window": 3, "hysteresis": 1}}}}
USUAL = {{"clip": 0.5, "accumulation": 3, "elements": 300}}
SAME = {{**USUAL, "accumulation": 1, "torchs_arithmetic": True}}
MIXED = (Home.HOST, Home.STAGED)
"""

Shown = dict[str, Any]


def shown_by(script: str, folder: Path) -> Shown:
    """Run a script that reports, on two ranks; return its report."""
    done = run_on_ranks(script, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "shown.json").read_text(encoding="utf-8"))
