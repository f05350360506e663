"""Thinking longer and choosing by energy, held against loops over positions and plain descents."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.trainer.thinking import BINS, judge

Interlace = Callable[..., Any]


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Energies and losses of three samples, four steps and fifty positions; low energy helps."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 4, 50, generator=generator) * 5
    energies = losses + torch.randn(3, 4, 50, generator=generator)
    return energies, losses


def test_every_position_keeps_its_lowest_energy() -> None:
    energies, losses = case()
    thought = judge(energies, losses, 2)
    assert thought.counts == [1, 2, 3]
    for count, found in zip(thought.counts, thought.chosen, strict=True):
        for step in range(4):
            picked = []
            for place in range(50):
                best = min(range(count), key=lambda m: float(energies[m, step, place]))
                picked.append(float(losses[best, step, place]))
            assert found[step] == pytest.approx(sum(picked) / 50, rel=1e-6)
    assert thought.random == pytest.approx(losses.double().mean((0, 2)).tolist())
    for count, found in zip(thought.counts, thought.known, strict=True):
        assert found == pytest.approx(float(losses[:count, -1].min(0).values.double().mean()))
    assert thought.known[-1] < thought.chosen[-1][-1] < thought.random[-1]


def test_energy_that_knows_the_error_is_told_from_one_that_does_not() -> None:
    energies, losses = case()
    helpful = judge(energies, losses, 2)
    assert helpful.rank_correlation > 0.6
    assert helpful.better_than_random is not None and helpful.better_than_random > 0.7
    assert len(helpful.energies) == BINS and helpful.energies == sorted(helpful.energies)
    assert helpful.errors[-1] > helpful.errors[0] + 2
    blind = judge(energies.roll(7, dims=2), losses, 2)
    assert abs(blind.rank_correlation) < 0.2
    backward = judge(-losses, losses, 2)
    assert backward.rank_correlation == pytest.approx(-1)
    assert backward.better_than_random == 0.0


def test_one_sample_leaves_nothing_to_choose() -> None:
    energies, losses = case()
    thought = judge(energies[:1], losses[:1], 2)
    assert thought.counts == [1]
    assert thought.better_than_random is None
    assert thought.chosen[0] == pytest.approx(thought.random)


@pytest.fixture(scope="module")
def run(
    interlace: Interlace, tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny trained model with an energy."""
    folder = tmp_path_factory.mktemp("energy") / "run"
    words = ("train.objective=energy", "train.steps=10", f"run.dir={folder}")
    done = interlace("train", *tiny, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_command_shows_steps_and_samples_and_draws_them(
    run: Path, interlace: Interlace
) -> None:
    words = ("think", str(run), "--samples", "2", "--rows", "3")
    done = interlace(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("loss in nats per token over 96 held-out positions")
    assert lines[2].split() == ["steps", "one", "best", "of", "2", "at", "random"]
    assert [line.split()[:-3] for line in lines[3:7]] == [["1"], [">", "2"], ["3"], ["4"]]
    assert lines[7].startswith("by answer")
    assert (run / "thinking.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture  {run / 'thinking.png'}" in done.stdout
    again = interlace(*words, "--json", "--steps", "4")
    thought = json.loads(again.stdout)
    assert thought["positions"] == 96 and thought["trained_steps"] == 2
    assert [f"{loss:.4f}" for loss in thought["random"]] == [
        line.split()[-1] for line in lines[3:7]
    ]


def test_as_many_steps_as_in_training_have_the_loss_of_a_validation(
    run: Path, interlace: Interlace
) -> None:
    """Starts are other draws, so the losses agree as far as starts matter little."""
    done = interlace("think", str(run), "--samples", "1", "--rows", "1000", "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert json.loads(done.stdout)["random"][1] == pytest.approx(last["val_loss"], rel=0.05)


def test_wrong_wishes_are_answered(run: Path, interlace: Interlace, tmp_path: Path) -> None:
    done = interlace("think", str(run), "--samples", "0", "--rows", "-1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "interlace: --samples 0: must be 1 or more",
        "--rows -1: must be 1 or more",
    ]
    done = interlace("think", str(run), "--picture", str(tmp_path / "picture.txt"))
    assert done.returncode == 2
    assert "give a file that ends in .png, .svg or .pdf" in done.stderr


def test_a_model_without_an_energy_is_refused(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    assert interlace("train", *tiny, "train.steps=1", f"run.dir={plain}").returncode == 0
    done = interlace("think", str(plain))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "interlace: train.objective=next_token: thinking descends an energy, and this model has "
        "none; train one with train.objective=energy"
    )
