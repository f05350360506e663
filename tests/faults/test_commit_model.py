"""However two starts of a run interleave, and wherever they are killed: nothing broken is visible,
nothing acknowledged is lost, and no step has two publishers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("ranks", "most_states"),
    [
        pytest.param(1, 500, id="some"),
        pytest.param(1, 10**9, id="all-of-1-rank", marks=pytest.mark.faults),
        pytest.param(2, 20_000, id="20000-of-2-ranks", marks=pytest.mark.faults),
    ],
)
def test_j2_no_interleaving_of_two_starts_breaks_a_promise(
    ranks: int, most_states: int, quick_home: Path, root: Path
) -> None:
    program = Path(__file__).with_name("harness") / "commit_model.py"
    home = quick_home / f"model-{ranks}-{most_states}"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), str(home), str(ranks), "1", str(most_states)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["problems"] == []
    assert summary["complete"] == (ranks == 1 and most_states > 500)
    assert summary["states"] >= min(most_states, 5000)
    # The disk looked in many ways, and schedules came to their ends: both starts did something.
    assert summary["disks"] > 20
    assert summary["ends"] > 0
