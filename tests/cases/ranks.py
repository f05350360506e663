"""Scripts that run on several ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path

LEAVE = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
"""How `interlace` itself ends: gloo's threads may abort an interpreter that shuts down orderly."""


def run_on_ranks(script: str, folder: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script's text under torchrun, in an empty folder."""
    path = folder / "script.py"
    path.write_text(script + LEAVE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(ranks), str(path)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
