"""Directions of shadows are the steps of optimizers of their own, and a run measures along them
without noticing.
"""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.kernels.update import SGD, AdamW, CoordinateClip, Signum, UpdateRule, clipped_sgd
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.trainer.config import load_recipe
from interlace.trainer.diagnostics.directions import Shadow, shadow_of
from interlace.trainer.models.language_model import LanguageModel

Interlace = Callable[..., subprocess.CompletedProcess[str]]
WORDS = (
    "observe.diagnostics=['directional_sharpness']",
    "sharpness.rules=['sgd','clipped_sgd','signum','adamw']",
    "sharpness.steps=[1,3]",
    "sharpness.every_steps=4",
    "train.steps=5",
    "observe.log_every_steps=5",
)
SHAPES = ((4, 3), (6,), ())
BLOCKS = (
    {"rows": 3, "lr": 0.25, "threshold": 2.0},
    {"rows": 1, "weight_decay": 4.0, "eps": 3.0},
)


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sharpness(record: Mapping[str, float]) -> dict[str, float]:
    prefix = "directional_sharpness."
    return {key[len(prefix) :]: x for key, x in record.items() if key.startswith(prefix)}


def clones_of(weights: Sequence[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    return {weight: weight.detach().clone() for weight in weights}


def make_groups(weights: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """A matrix whose rows differ, and others with a rate of their own."""
    return [
        {"params": [weights[0]], "row_blocks": [dict(block) for block in BLOCKS]},
        {"params": list(weights[1:]), "lr": 0.01},
    ]


@pytest.mark.parametrize(
    "rule",
    [
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        SGD(lr=0.1, momentum=0.0),
        AdamW(lr=0.1, eps=1e-3),
        Signum(lr=0.1),
        clipped_sgd(0.1, threshold=0.3),
        clipped_sgd(0.1, policy="lagged_quantile", share=0.3),
        clipped_sgd(0.1, policy="global_quantile", share=0.3),
        CoordinateClip(AdamW(lr=0.1), threshold=0.5, stage="update"),
    ],
    ids=lambda rule: f"{rule.name} {getattr(rule, 'policy', 'whole')} {rule.moments}",
)
@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_a_shadow_takes_the_steps_of_an_optimizer_of_its_own(
    rule: UpdateRule, clip_norm: float | None
) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = make_groups(weights)
    for group in groups:
        group["weight_decay"] = 0.0
    optimizer = OffloadedOptimizer(groups, rule, strategy="none", clip_norm=clip_norm)
    shadow = Shadow(rule, make_groups(weights), clip_norm)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        norm = optimizer.gradient_norm()
        before = clones_of(weights)
        steps = shadow.follow(list(optimizer.gradients()), norm, before)
        optimizer.step()
        optimizer.zero_grad()
        for weight in weights:
            moved = weight.detach() - before[weight]
            # The optimizer's arithmetic is in fp32, and so is this difference.
            torch.testing.assert_close(steps[weight], moved, rtol=1e-4, atol=3e-7)
    optimizer.close()


def test_decay_is_no_part_of_a_direction() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    shadow = Shadow(AdamW(lr=0.1, weight_decay=0.5), [{"params": [weight]}], None)
    step = shadow.follow([(weight, torch.zeros(3))], 0.0, clones_of([weight]))[weight]
    assert torch.equal(step, torch.zeros(3))


def test_a_parameter_without_a_gradient_has_no_direction_and_is_behind_afterwards() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    masters = clones_of(weights)
    shadow = Shadow(AdamW(lr=0.1), [{"params": weights}], None)
    assert list(shadow.follow([(weights[0], torch.ones(2))], 1.0, masters)) == [weights[0]]
    steps = shadow.follow([(each, torch.ones(2)) for each in weights], 1.0, masters)
    assert shadow.updates == {weights[0]: 2, weights[1]: 1}
    torch.testing.assert_close(steps[weights[0]], steps[weights[1]])


def test_under_mup_each_rule_has_the_rates_of_its_own_table() -> None:
    words = ["model.width=128", "model.ffn_width=256", "mup.enabled=true", "mup.base_width=64"]
    config = load_recipe("fault-drill", words).config
    with torch.device("meta"):
        model = LanguageModel(config.model, 257)
    hidden = model.get_parameter("layers.0.blocks.0.mixer.query.weight")
    rates = {
        name: shadow_of(name, model, config).groups[hidden]["lr"] / config.optimizer.peak_lr
        for name in ("adamw", "sgd", "clipped_sgd", "signum")
    }
    assert rates == {"adamw": 0.5, "sgd": 1.0, "clipped_sgd": 1.0, "signum": 0.5}
    threshold = shadow_of("clipped_sgd", model, config).groups[hidden]["threshold"]
    assert threshold == config.coordinate_clip.threshold / 2


def test_a_run_measures_chosen_steps_and_trains_as_if_it_did_not(
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
    losses_of: Callable[[Path], list[str]],
) -> None:
    for name, words in (("with", ()), ("without", ("observe.diagnostics=[]",))):
        where = f"run.dir={tmp_path / name}"
        done = interlace("train", *tiny, *WORDS, *words, "offload.strategy=host", where)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    found = records(tmp_path / "with")
    assert [record["step"] for record in found if sharpness(record)] == [1, 3, 4]
    for record in found:
        if sharpness(record):
            assert set(sharpness(record)) == {"sgd", "clipped_sgd", "signum", "adamw"}
    # Early on the gradient's own direction is the sharpest by far.
    third = sharpness(found[2])
    assert third["sgd"] > 2 * max(third["clipped_sgd"], third["signum"], third["adamw"]) > 0


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (
            (),
            2,
            "observe.diagnostics=directional_sharpness: second derivatives are not taken through "
            "sharded layers, and this run has 2 ranks; type "
            "observe.diagnostics=['critical_sharpness'], or start it on one",
        ),
        (
            ("offload.strategy=host", "offload.overlap=backward", "optimizer.clip=0.0"),
            1,
            "observe.diagnostics=directional_sharpness: with offload.overlap=backward weights "
            "change before the gradient is complete, and their curvature belongs to none; type "
            "offload.overlap=forward",
        ),
    ],
    ids=["ranks", "early updates"],
)
def test_a_run_that_cannot_be_measured_is_refused_before_its_first_step(
    words: Sequence[str],
    ranks: int,
    message: str,
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
) -> None:
    where = f"run.dir={tmp_path / 'run'}"
    done = interlace("train", *tiny, *WORDS, *words, where, ranks=ranks)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
