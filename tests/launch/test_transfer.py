"""The learning rate of a narrow model is that of a wide one, in small: half a minute of a core."""

import json
from pathlib import Path
from typing import Any

import pytest

from interlace.launch.cli import main

SHORT = ("train.steps=60", "train.tokens_per_step=512", "train.validation_tokens=4096")


@pytest.mark.long
def test_the_best_rate_stays_under_mup_and_falls_without(tmp_path: Path) -> None:
    words = ["sweep", "proxy", "--widths", "32,128", "--lr", "2**-10:2**-5", "--seeds", "1"]
    words += ["--parametrisation", "both", "--jobs", "1", "--store", str(tmp_path / "trials")]
    status = main([*words, "--output", str(tmp_path), *SHORT])
    found: dict[str, Any] = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    drift = {each["parametrisation"]: each["transfer"]["drift"] for each in found["families"]}
    assert abs(drift["mup"]) <= 0.15
    assert drift["standard"] <= -0.5
    regrets = {each["parametrisation"]: each["transfer"]["regrets"] for each in found["families"]}
    assert [each["passes"] for each in regrets["mup"]] == [True]
    assert [each["passes"] for each in regrets["standard"]] == [False]
    assert status == 0
