"""Runs under muP: at the base width as without it, alike on any number of ranks, and resumed only
with the manifest they were begun with.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mup_cases import FAMILIES, VOCABULARY, WIDTH, model_of, optimizer_of, recipe

from interlace.launch.cli import main
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.mup.manifest import MANIFEST_NAME, manifest_of
from interlace.trainer.optimizer import set_learning_rate
from interlace.trainer.run_folder import read_config

Losses = Callable[[Path], list[str]]

HYBRID = (
    "model.pattern=MF AF",
    "model.layers=1",
    "model.kv_heads=2",
    "model.mamba_head_width=8",
    "model.mamba_state_width=8",
)
STEPS = ("train.steps=8", "checkpoint.every_steps=4", "train.validate_every_steps=0")
MUP = ("mup.enabled=true", "mup.base_width=16")
CLIPPED = ("optimizer.rule=clipped_sgd", "optimizer.peak_lr=0.5")


def trained(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the weights after two updates."""
    model = model_of(config, torch.float32)
    optimizer = optimizer_of(model, config)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 0.01 / (1 + step))
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("rule", ["adamw", "clipped_sgd"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_at_the_base_width_updates_have_the_bits_of_those_without_mup(
    family: str, rule: str
) -> None:
    settings = {"rule": rule, "clip": 0.0, "weight_decay": 0.1}
    own = trained(recipe(family, optimizer=settings, mup={"base_width": WIDTH}))
    plain = trained(recipe(family, optimizer=settings, mup={"enabled": False}))
    assert own.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(own[name], value), name
    # And it is the width that decides: from a narrower base they are others.
    other = trained(recipe(family, optimizer=settings))
    assert any(not torch.equal(other[name], value) for name, value in plain.items())


@pytest.fixture(scope="module")
def run(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a hybrid under muP, by clipped SGD."""
    folder = tmp_path_factory.mktemp("mup") / "run"
    assert main(["train", *tiny, *STEPS, *HYBRID, *MUP, *CLIPPED, f"run.dir={folder}"]) == 0
    return folder


def test_a_run_at_its_base_width_has_the_losses_of_one_without_mup(
    tiny: Sequence[str], losses_of: Losses, tmp_path: Path
) -> None:
    words = (*tiny, "train.steps=5", *HYBRID, "train.validate_every_steps=0")
    own = ("mup.enabled=true", "mup.base_width=32", "mup.grows=head_width")
    assert main(["train", *words, f"run.dir={tmp_path / 'plain'}"]) == 0
    assert main(["train", *words, *own, f"run.dir={tmp_path / 'own'}"]) == 0
    assert losses_of(tmp_path / "own") == losses_of(tmp_path / "plain")
    assert len(losses_of(tmp_path / "own")) == 5
    assert not (tmp_path / "plain" / MANIFEST_NAME).exists()


def test_a_run_keeps_its_manifest(run: Path) -> None:
    kept = json.loads((run / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert kept == manifest_of(read_config(run), VOCABULARY).document
    assert kept["multipliers"] == {"norm.multiplier": 0.5}
    assert "layers.0.blocks.0.mixer.in_proj.weight[B]" in kept["parameters"]


def numbers(run: Path) -> torch.Tensor:
    """Return the losses of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def test_a_changed_base_width_is_refused_on_resuming(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(run), "train.steps=9", "mup.base_width=32"]) == 2
    message = capsys.readouterr().err
    assert "mup.base_width" in message and "16" in message and "32" in message


def test_a_checkpoint_of_another_manifest_is_refused_with_what_differs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    kept = (copy / "config.toml").read_text(encoding="utf-8")
    faked = kept.replace("base_width = 16", "base_width = 32")
    assert faked != kept
    (copy / "config.toml").write_text(faked, encoding="utf-8")
    assert main(["train", "--resume", str(copy), "train.steps=9"]) == 2
    message = capsys.readouterr().err
    assert "muP scales this model otherwise than the one of the checkpoint" in message
    changed = "fan_out=2.0 lr=2.0 weight_decay=0.5 eps=0.5 threshold=0.5"
    before = "fan_out=1.0 lr=1.0 weight_decay=1.0 eps=1.0 threshold=1.0"
    assert f"norm.multiplier: 0.5, now 1.0; embedding.weight: {changed}, now {before};" in message
    assert "more; restore the settings under [mup] and [model], or start a new run" in message
    # As it was, it goes on.
    (copy / "config.toml").write_text(kept, encoding="utf-8")
    assert main(["train", "--resume", str(copy), "train.steps=9"]) == 0
    assert "resumed from the checkpoint of step 8" in capsys.readouterr().out
    assert len(numbers(copy)) == 9
