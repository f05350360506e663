"""The first commands a newcomer types: each trains a model that has learned something, and says
where it is.

Whole quickstarts, with the losses that the README states, are for `make test-long`.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def stated_losses() -> dict[str, float]:
    """Return the validation loss, in nats per byte, that the README states of each quickstart."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(quickstart\w*)` \|.*\| (\d\.\d+) \|", readme, flags=re.MULTILINE)
    return {name: float(loss) for name, loss in rows}


def trained(interlace: Callable[..., Any], folder: Path, *words: str) -> tuple[Path, str]:
    """Train with all cores in an empty folder; return the run folder and what was printed."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = interlace("train", *words, environment=threads, cwd=folder, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / f"{words[0]}-0001", done.stdout


def test_a_short_quickstart_learns_python_and_shows_a_sample(
    interlace: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("quickstart", "train.steps=30", "train.validation_tokens=16384")
    run, printed = trained(interlace, tmp_path, *words)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    # An untrained model needs 8 bits per byte.
    assert records[-1]["val_bits_per_byte"] < 4.5
    assert "--- sample 1 ---\ndef " in printed
    for name in ("loss.png", "samples.txt", "report.html"):
        assert str(run / name) in printed
        assert (run / name).is_file()


@pytest.mark.long
@pytest.mark.parametrize("name", stated_losses())
def test_a_quickstart_reaches_the_loss_that_the_readme_states(
    name: str, interlace: Callable[..., Any], tmp_path: Path
) -> None:
    run, _ = trained(interlace, tmp_path, name)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert records[-1]["val_loss"] == pytest.approx(stated_losses()[name], rel=0.02)
    if name == "quickstart_ebt":
        first, second = (
            sum(record[f"loss_step_{step}"] for record in records[-50:]) for step in (1, 2)
        )
        assert second < first


def test_the_readme_states_the_loss_of_every_quickstart() -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("quickstart*.toml")}
    # Offloading changes no number; update rules are compared in docs/optimizers.md.
    assert set(stated_losses()) == shipped - {"quickstart_offload", "quickstart_clipped"}
