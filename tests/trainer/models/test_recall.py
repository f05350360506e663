"""One layer of attention recalls what a small state does not, after as many steps."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def test_a_row_asks_for_the_value_that_it_showed_beside_each_key() -> None:
    from recall import Task

    task = Task(keys=9, values=5, pairs=6)
    tokens, wanted = task.batch(50, torch.Generator().manual_seed(0))
    for row, values in zip(tokens.tolist(), wanted.tolist(), strict=True):
        shown = dict(zip(row[0:12:2], row[1:12:2], strict=True))
        assert len(shown) == 6 and sorted(row[12:]) == sorted(shown)
        assert max(shown) < 9 <= min(shown.values()) and max(shown.values()) < 14
        assert [shown[key] for key in row[12:]] == values
    orders = {tuple(row[12:].index(key) for key in row[0:12:2]) for row in tokens.tolist()}
    assert len(orders) > 10


@pytest.mark.long
def test_a_hybrid_recalls_more_than_mamba_2_alone() -> None:
    from recall import Task, Training, learn

    task = Task(keys=16, values=16, pairs=12)
    found: dict[str, float] = {}
    # Each at the better of the benchmark's two rates.
    for pattern, rate in (("M A", 4e-3), ("M M", 1e-2)):
        training = Training(pattern=pattern, peak_lr=rate, steps=300, state_width=2)
        found[pattern] = learn(task, training, lambda *_: None, every=300).accuracy[-1]
    assert found["M A"] > 0.95
    assert found["M M"] < 0.4
