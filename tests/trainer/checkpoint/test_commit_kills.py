"""However and whenever ranks are killed: nothing broken is visible, nothing promised is lost."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from interlace.trainer.checkpoint.failpoints import FAILPOINTS

KILLS = 300
SEED = 20_260_101


@pytest.fixture
def quick_folder(tmp_path: Path) -> Generator[Path, None, None]:
    """A folder in memory where there is one: SIGKILL keeps what was written without fsync, so a
    disk would only make the trials slow. What fsync is for is tested in test_commit.py.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_300_kills_show_nothing_broken_and_lose_nothing_promised(quick_folder: Path) -> None:
    program = Path(__file__).with_name("commit_kill_trials.py")
    done = subprocess.run(
        [sys.executable, str(program), str(quick_folder), str(KILLS), str(SEED)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["problems"] == []
    killed = summary["killed"]
    assert sum(killed.values()) == KILLS
    assert killed["time"] == KILLS // 2
    # Every point of the commit layer was hit; some saves were interrupted and others were not.
    assert set(killed) - {"time"} == {
        name for name in FAILPOINTS if not name.startswith(("snap.", "step."))
    }
    assert summary["abandoned"] > KILLS // 10
    assert summary["promised"] > KILLS // 10
    # The next start went on as if nothing had happened.
    assert summary["attempts"] > KILLS // 2
    assert summary["inflight"] == ["1000000." + str(summary["attempts"])]
    assert summary["trash"] == []
