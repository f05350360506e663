"""Critical sharpness is known for quadratic losses; in a run it leaves no trace and does not depend
on the number of ranks.
"""

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from interlace.trainer.diagnostics.critical_sharpness import critical_multiple

Interlace = Callable[..., subprocess.CompletedProcess[str]]
WORDS = (
    "observe.diagnostics=['critical_sharpness']",
    "sharpness.steps=[2,4]",
    "sharpness.every_steps=0",
    "train.steps=5",
    "observe.log_every_steps=5",
)


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Counted:
    """A function that knows how often it was called."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, multiple: float) -> float:
        self.calls += 1
        return self.function(multiple)


@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.4, 1.0, 30.0])
def test_of_gradient_descent_on_a_quadratic_it_is_the_curvature_along_the_gradient(
    rate: float,
) -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix = root @ root.T
    w = torch.randn(6, dtype=torch.float64)
    gradient = matrix @ w

    def loss(multiple: float) -> float:
        moved = w - multiple * rate * gradient
        return float(0.5 * moved @ matrix @ moved)

    counted = Counted(loss)
    multiple = critical_multiple(counted)
    assert multiple is not None
    critical = multiple * rate
    directional = float(gradient @ matrix @ gradient / (gradient @ gradient))
    assert 2 / critical == pytest.approx(directional, rel=1e-8)
    assert counted.calls <= 10


def test_a_loss_that_is_no_parabola_is_crossed_within_a_few_percent() -> None:
    counted = Counted(lambda s: -math.sin(s / 5) + (s / 30) ** 4)
    # Where sin(s / 5) is (s / 30) ** 4, found by bisection.
    low, high = 1.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if counted.function(middle) < 0 else (low, middle)
    assert critical_multiple(counted) == pytest.approx(low, rel=0.05)
    assert counted.calls <= 7


def test_a_loss_that_overflows_counts_as_raised() -> None:
    multiple = critical_multiple(lambda s: -s if s < 7 else math.nan)
    assert multiple is not None
    assert 4.0 < multiple < 16.0


def test_without_a_finite_loss_there_is_nothing_to_raise() -> None:
    assert critical_multiple(lambda s: math.nan) is None
    assert critical_multiple(lambda s: math.inf - s) is None


def test_a_step_that_raises_the_loss_from_the_start_has_no_critical_rate() -> None:
    assert critical_multiple(lambda s: s) == 0.0


def test_a_step_that_always_lowers_the_loss_has_the_longest_one() -> None:
    assert critical_multiple(lambda s: -s) == 2.0**20


@pytest.fixture(scope="module")
def run(
    interlace: Interlace, tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that measures its second and its fourth step."""
    path = tmp_path_factory.mktemp("measured") / "run"
    done = interlace("train", *tiny, *WORDS, f"run.dir={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_a_run_measures_chosen_steps_and_trains_as_if_it_did_not(
    run: Path,
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
    losses_of: Callable[[Path], list[str]],
) -> None:
    done = interlace("train", *tiny, "train.steps=5", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(run) == losses_of(tmp_path / "run")
    measured = [record for record in records(run) if "critical_sharpness" in record]
    assert [record["step"] for record in measured] == [2, 4]
    for record in measured:
        product = record["critical_sharpness"] * record["critical_learning_rate"]
        assert product == pytest.approx(2.0)
        # A step that lowers the loss of its own rows is below the critical one.
        assert record["critical_learning_rate"] > record["lr"]


@pytest.mark.long
def test_it_does_not_depend_on_ranks_and_offloading(
    run: Path, interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    words = ("train.steps=2", "offload.strategy=host", f"run.dir={tmp_path / 'run'}")
    done = interlace("train", *tiny, *WORDS, *words, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    # A difference of losses in fp32, added up in another order.
    one, two = (records(path)[1]["critical_sharpness"] for path in (run, tmp_path / "run"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("model.pattern=ME",), id="mamba and experts", marks=pytest.mark.long),
        pytest.param(
            (
                "train.objective=energy",
                "energy.step_size=20.0",
                "energy.replay_rows=16",
                "energy.replay_share=0.5",
            ),
            id="energy with replay",
            marks=pytest.mark.long,
        ),
    ],
)
def test_models_without_a_second_derivative_have_it_too(
    words: Sequence[str],
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
    losses_of: Callable[[Path], list[str]],
) -> None:
    for name, more in (("with", ()), ("without", ("observe.diagnostics=[]",))):
        where = f"run.dir={tmp_path / name}"
        done = interlace("train", *tiny, *WORDS, *words, *more, where)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    assert "critical_sharpness" in records(tmp_path / "with")[1]
