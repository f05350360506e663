"""What several tests of the command line share."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from interlace.launch.cli import main


@pytest.fixture
def plan_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `interlace plan WORDS --json` and return the document."""

    def plan(*words: str) -> Any:
        assert main(["plan", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Trials of a sweep are too small to be shared by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
