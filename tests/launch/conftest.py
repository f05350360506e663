"""What several tests of the command line share."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from interlace.launch.cli import main


@pytest.fixture
def plan_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `interlace plan WORDS --json` and return the document."""

    def plan(*words: str) -> Any:
        assert main(["plan", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return plan
