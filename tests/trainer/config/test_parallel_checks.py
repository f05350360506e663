"""What DeepSpeed's engine cannot do is refused in words, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from interlace.trainer.config import load_recipe
from interlace.trainer.config.checks import CHECKS
from interlace.trainer.config.parallel_checks import zero_reaches_all_it_trains
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError

REFUSED = {
    "parallel.replicas=2": "parallel.replicas=2: parallel.engine=deepspeed divides among all "
    "ranks; type parallel.replicas=1 or parallel.engine=fsdp2",
    "optimizer.rule=signum": "optimizer.rule=signum: parallel.engine=deepspeed steps an optimizer "
    "of torch, which has no such rule; type optimizer.rule=adamw or optimizer.rule=sgd, or "
    "parallel.engine=fsdp2",
    "optimizer.rule=clipped_sgd": "optimizer.rule=clipped_sgd: parallel.engine=deepspeed steps an "
    "optimizer of torch, which has no such rule; type optimizer.rule=adamw or optimizer.rule=sgd, "
    "or parallel.engine=fsdp2",
    "coordinate_clip.stage=gradient": "coordinate_clip.stage=gradient: parallel.engine=deepspeed "
    "steps an optimizer of torch, which clips no coordinates; type coordinate_clip.stage=none or "
    "parallel.engine=fsdp2",
    "offload.moments=bfloat16": "offload.moments=bfloat16: parallel.engine=deepspeed keeps masters "
    "and moments in float32; type offload.moments=float32 or parallel.engine=fsdp2",
    "offload.split_master=true": "offload.split_master=true: parallel.engine=deepspeed keeps "
    "masters and moments in float32; type offload.split_master=false or parallel.engine=fsdp2",
    "offload.overlap=forward": "offload.overlap=forward: parallel.engine=deepspeed begins and ends "
    "an update within its own step; type offload.overlap=none or parallel.engine=fsdp2",
    "guard.recompute_every_steps=5": "guard.recompute_every_steps=5: parallel.engine=deepspeed "
    "reduces gradients during backward, and a pass that is computed twice would count twice; type "
    "guard.recompute_every_steps=0 or parallel.engine=fsdp2",
    "offload.strategy=host guard.check_state_every_steps=5": "guard.check_state_every_steps=5: "
    "state of parallel.engine=deepspeed is not checksummed; type guard.check_state_every_steps=0 "
    "or parallel.engine=fsdp2",
    "observe.diagnostics=['gradient_norms','critical_sharpness']": "observe.diagnostics="
    "critical_sharpness: needs the optimizer of this project, and parallel.engine=deepspeed has "
    "its own; type observe.diagnostics=['gradient_norms'] or parallel.engine=fsdp2",
    "train.objective=energy": "train.objective=energy: has a gradient in its loss, and "
    "parallel.zero_stage=3 gathers weights in hooks that can be differentiated only once; type "
    "parallel.zero_stage=2 or parallel.engine=fsdp2",
    "parallel.zero_stage=4": "parallel.zero_stage=4: must be one of 1, 2 or 3 (With `engine = "
    '"deepspeed"`: what is divided among the ranks: optimizer state (1), gradients too (2), '
    "weights too (3)); type parallel.zero_stage=1",
}

ALLOWED = (
    "parallel.zero_stage=1",
    "train.compile=true",
    "parallel.zero_stage=2 train.objective=energy",
    "optimizer.rule=sgd optimizer.nesterov=true",
    "offload.strategy=optimal offload.overlap=none",
    "guard.spike_sigmas=6",
    "observe.diagnostics=['gradient_norms','gradient_histogram']",
)


def recipe(words: str) -> None:
    load_recipe("quickstart", words.split())


@pytest.mark.parametrize("words", REFUSED)
def test_what_zero_cannot_do_is_refused_under_it_only(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(f"parallel.engine=deepspeed {words}")
    assert list(caught.value.problems) == [REFUSED[words]]
    if "zero_stage" not in words and "forward" not in words:
        recipe(words)


@pytest.mark.parametrize("words", ALLOWED)
def test_what_zero_can_do_is_allowed(words: str) -> None:
    recipe(f"parallel.engine=deepspeed {words}")


@pytest.mark.parametrize(
    ("settings", "engine", "refused"),
    [
        ({"train_only": "all", "logit_weight": 0.0}, "deepspeed", True),
        ({"train_only": "all", "logit_weight": 0.0}, "fsdp2", False),
        ({"train_only": "all", "logit_weight": 0.0, "likelihood_weight": 1.0}, "deepspeed", False),
        ({"train_only": "all"}, "deepspeed", False),
        ({"logit_weight": 0.0}, "deepspeed", False),
    ],
)
def test_weights_that_nothing_is_learnt_for_would_decay_under_zero(
    settings: dict[str, Any], engine: str, refused: bool
) -> None:
    config = RunConfig.model_validate(
        {
            "parallel": {"engine": engine},
            "train": {"objective": "distill"},
            "distill": {"teacher": "somewhere", **settings},
        }
    )
    message = (
        "distill.train_only=all: with distill.logit_weight=0 no gradient comes to layers that the "
        "teacher has too, and parallel.engine=deepspeed would let them decay; type "
        "distill.train_only=new, distill.logit_weight=1 or parallel.engine=fsdp2"
    )
    assert zero_reaches_all_it_trains(config) == (message if refused else None)
    assert zero_reaches_all_it_trains in CHECKS


def test_all_that_zero_cannot_do_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe("parallel.engine=deepspeed parallel.replicas=2 offload.split_master=true")
    assert len(caught.value.problems) == 2


def test_settings_of_zero_want_its_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(f"parallel.zero_stage=2 parallel.deepspeed_config={tmp_path}/own.json")
    assert list(caught.value.problems) == [
        "parallel.zero_stage=2: parallel.engine=fsdp2 does not use it; type "
        "parallel.engine=deepspeed or parallel.zero_stage=3",
        f"parallel.deepspeed_config={tmp_path}/own.json: parallel.engine=fsdp2 does not read it; "
        "type parallel.engine=deepspeed, or parallel.deepspeed_config= for none",
    ]


def test_a_file_of_settings_lies_beside_the_recipe_that_names_it(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[parallel]\nengine = "deepspeed"\ndeepspeed_config = "json/zero.json"\n')
    loaded = load_recipe(str(own)).config.parallel.deepspeed_config
    assert loaded == str(tmp_path / "json" / "zero.json")
    typed = load_recipe(str(own), ["parallel.deepspeed_config=zero.json"]).config.parallel
    assert typed.deepspeed_config == str(Path.cwd() / "zero.json")
    assert load_recipe(str(own), ["parallel.deepspeed_config="]).config.parallel == (
        typed.model_copy(update={"deepspeed_config": ""})
    )
