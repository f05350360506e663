"""What is made of a recipe before DeepSpeed starts: torch's optimizer, with every tensor's rate."""

import pytest
import torch
from mup_cases import VOCABULARY, model_of, recipe

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines.zero.opening import client_of, require_whole_tensors
from interlace.trainer.errors import ConfigError
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.optimizer import parameter_groups
from interlace.trainer.rules import rule_of


def client(config: RunConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe's model."""
    model = model_of(config, torch.float32)
    manifest = manifest_of(config, VOCABULARY)
    return client_of(config, parameter_groups(model, rule_of(config).hyperparameters(), manifest))


def test_the_rule_and_its_numbers_are_those_of_the_recipe() -> None:
    adamw = client(recipe(mup={"enabled": False}, optimizer={"beta1": 0.8, "weight_decay": 0.3}))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {group["betas"][0] for group in adamw.param_groups} == {0.8}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.3}
    sgd = client(recipe(mup={"enabled": False}, optimizer={"rule": "sgd", "beta1": 0.7}))
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.7}


def test_tensors_that_scale_in_different_ways_are_groups_of_their_own() -> None:
    factors = {group["rate_factor"] for group in client(recipe()).param_groups}
    assert len(factors) > 1


def test_rows_of_one_tensor_have_one_rate_or_are_refused() -> None:
    require_whole_tensors(manifest_of(recipe(), VOCABULARY))
    with pytest.raises(ConfigError) as caught:
        require_whole_tensors(manifest_of(recipe("hybrid"), VOCABULARY))
    assert str(caught.value) == (
        "mup.enabled=true: some tensors of this model have blocks of rows that scale in different "
        "ways, and parallel.engine=deepspeed has one rate per tensor; type parallel.engine=fsdp2"
    )
