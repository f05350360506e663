"""Quantiles and histograms of magnitudes are those of the gradients, on any number of ranks."""

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from interlace.kernels.update import AdamW
from interlace.kernels.update.histogram import magnitude_histogram
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics.gradient_histogram import GradientHistogram, in_octaves
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.world import World

Interlace = Callable[..., subprocess.CompletedProcess[str]]
WORDS = ("observe.diagnostics=['gradient_histogram']", "observe.log_every_steps=2", "train.steps=3")
BIN = 1 + 1 / 8
"""Most that two numbers of the same bin differ by, as a ratio."""


class Nothing:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: object) -> None:
        return


def diagnose(gradients: Sequence[torch.Tensor]) -> tuple[GradientHistogram, dict[str, float]]:
    """Return the diagnostic and its numbers for a model with these gradients."""
    model = nn.Module()
    for number, gradient in enumerate(gradients):
        model.register_module(f"part{number}", nn.ParameterList([torch.zeros_like(gradient)]))
    optimizer = OffloadedOptimizer(model.parameters(), AdamW(), strategy="none")
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    state = TrainingState(model, Fsdp2Engine(optimizer), Nothing(), World())
    found = GradientHistogram(RunConfig(), state)
    numbers = dict(found.after_backward(1))
    optimizer.close()
    return found, numbers


def test_quantiles_are_right_to_within_a_bin() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(50, 40) * 1e-4, torch.randn(300).exp() * 1e-3, torch.zeros(100)]
    _, numbers = diagnose(gradients)
    magnitudes = torch.cat([each.flatten().abs() for each in gradients])
    nonzero = magnitudes[magnitudes > 0]
    for name, share in {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}.items():
        exact = float(nonzero.quantile(share))
        assert exact / BIN < numbers[f"gradient_{name}"] < exact * BIN
    assert numbers["gradient_max"] == float(magnitudes.max())
    assert numbers["gradient_zeros"] == pytest.approx(100 / len(magnitudes))


def test_coordinates_that_are_not_finite_are_counted_with_the_zeros() -> None:
    _, numbers = diagnose([torch.tensor([0.0, math.nan, math.inf, 2.0])])
    assert numbers["gradient_max"] == 2.0
    assert numbers["gradient_zeros"] == 0.75


def test_a_gradient_of_zeros_has_quantiles_of_zero_and_histograms_without_counts() -> None:
    found, numbers = diagnose([torch.zeros(3)])
    assert {numbers[f"gradient_{name}"] for name in ("p10", "p50", "p90", "p99", "max")} == {0.0}
    assert {sum(each.counts) for each in found.histograms().values()} == {0.0}


def test_histograms_count_octaves_of_every_part_and_of_all() -> None:
    found, _ = diagnose([torch.tensor([1.0, 1.5, -2.0]), torch.tensor([0.25, 0.0])])
    histograms = found.histograms()
    assert list(histograms) == [f"gradient_histogram.{x}" for x in ("all", "part0", "part1")]
    assert histograms["gradient_histogram.part0"].edges == [0.0, 1.0, 2.0]
    assert histograms["gradient_histogram.part0"].counts == [2.0, 1.0]
    assert histograms["gradient_histogram.all"].edges == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert histograms["gradient_histogram.all"].counts == [1.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("exponent", [-126, -60, 0, 127])
def test_octaves_are_those_of_floats(exponent: int) -> None:
    histogram = in_octaves(magnitude_histogram(torch.tensor([1.25 * 2.0**exponent])))
    assert histogram.edges == [exponent, exponent + 1]


@pytest.mark.long
def test_a_run_records_quantiles_and_gives_tensorboard_histograms_on_any_number_of_ranks(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    found: list[dict[str, float]] = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        done = interlace("train", *tiny, *WORDS, f"run.dir={run}", ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append({key: x for key, x in records[1].items() if key.startswith("gradient_")})
        board = EventAccumulator(str(run / "tensorboard"), {"histograms": 0}).Reload()
        tags = cast(list[str], board.Tags()["histograms"])
        assert "model/gradient_histogram.layers.1.blocks.0" in tags
        shown = board.Histograms("model/gradient_histogram.all")
        assert [each.step for each in shown] == [1, 2, 3]
        counted = sum(shown[1].histogram_value.bucket)
        parameters = sum(
            sum(board.Histograms(tag)[1].histogram_value.bucket)
            for tag in tags
            if not tag.endswith(".all")
        )
        assert counted == pytest.approx(parameters)
    assert found[0]["gradient_p10"] < found[0]["gradient_p50"] < found[0]["gradient_max"]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
