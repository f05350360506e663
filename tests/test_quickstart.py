"""The first command a newcomer types: it trains a model that has learned something, and says
where it is.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_quickstart_learns_python_and_shows_a_sample(
    interlace: Callable[..., Any], tmp_path: Path
) -> None:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = interlace("train", "quickstart", environment=threads, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "quickstart-0001"
    records = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    # An untrained model needs 8 bits per byte.
    assert records[-1]["val_bits_per_byte"] < 2.5
    assert "--- sample 1 ---\ndef " in done.stdout
    for name in ("loss.png", "samples.txt", "report.html"):
        assert str(run / name) in done.stdout
        assert (run / name).is_file()
