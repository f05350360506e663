"""Parameter groups under muP: every tensor's share of the rates, and nothing that overwrites it."""

import math
from typing import Any

import pytest
import torch
from mup_cases import BASE, FAMILIES, VOCABULARY, WIDTH, model_of, optimizer_of, recipe
from torch import nn

from interlace.launch.cli import main
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Entry, manifest_of, skeleton
from interlace.trainer.optimizer import (
    check_rates,
    parameter_groups,
    set_learning_rate,
)
from interlace.trainer.rules import rule_of

M = WIDTH / BASE
Group = dict[str, Any]


def groups_of(config: RunConfig, model: Model | None = None) -> tuple[Model, list[Group]]:
    model = model or skeleton(config, VOCABULARY)
    hyper = rule_of(config).hyperparameters()
    return model, parameter_groups(model, hyper, manifest_of(config, VOCABULARY))


@pytest.mark.parametrize("rule", ["adamw", "sgd", "clipped_sgd", "signum"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_parameter_is_in_one_group_with_absolute_numbers_of_its_own(
    family: str, rule: str
) -> None:
    config = recipe(family, optimizer={"rule": rule, "peak_lr": 0.02, "weight_decay": 0.3})
    model, groups = groups_of(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    entries = manifest_of(config, VOCABULARY).by_name
    hyper = rule_of(config).hyperparameters()
    seen: list[str] = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            blocks = group.get("row_blocks") or [{"rows": parameter.shape[0]}]
            assert [block["rows"] for block in blocks] == [e.shape[0] for e in entries[name]]
            for entry, block in zip(entries[name], blocks, strict=True):
                check_block(entry, group, block, hyper, model.rate_factors.get(name))
    assert sorted(seen) == sorted(names.values())


def check_block(
    entry: Entry, group: Group, block: Group, hyper: Group, own_rate: float | None
) -> None:
    """Hold a group's numbers, times a block's factors, to the entry's."""
    factors = entry.factors
    lr = group["lr"] * block.get("lr", 1.0)
    assert lr == pytest.approx(hyper["lr"] * factors.lr * (own_rate or 1.0))
    decays = len(entry.shape) >= 2 and own_rate is None
    decay = group["weight_decay"] * block.get("weight_decay", 1.0)
    assert decay == pytest.approx(hyper["weight_decay"] * factors.weight_decay if decays else 0.0)
    for key in ("eps", "threshold"):
        assert (key in group) == (key in hyper)
        if key in hyper:
            found = group[key] * block.get(key, 1.0)
            assert found == pytest.approx(hyper[key] * getattr(factors, key)), entry.title


def test_without_mup_the_groups_are_matrices_and_vectors() -> None:
    config = recipe(mup={"enabled": False}, optimizer={"peak_lr": 0.1, "weight_decay": 0.2})
    _, groups = groups_of(config)
    assert [(each["lr"], each["weight_decay"]) for each in groups] == [(0.1, 0.2), (0.1, 0.0)]
    assert all("row_blocks" not in group for group in groups)


class Twin:
    """Rows of one entry, updated by its published formula with numbers of the manifest."""

    def __init__(self, entry: Entry, value: torch.Tensor, config: RunConfig) -> None:
        self.entry, self.value, self.config = entry, value.clone(), config
        self.moments = [torch.zeros_like(value), torch.zeros_like(value)]

    def step(self, gradient: torch.Tensor, number: int, rate: float) -> None:
        """Update by AdamW, or by clipped SGD with momentum and decoupled decay."""
        settings, factors = self.config.optimizer, self.entry.factors
        lr = rate * factors.lr
        decay = settings.weight_decay * factors.weight_decay if self.value.ndim >= 2 else 0.0
        self.value *= 1 - lr * decay
        first, second = self.moments
        if settings.rule == "adamw":
            first.mul_(settings.beta1).add_((1 - settings.beta1) * gradient)
            second.mul_(settings.beta2).add_((1 - settings.beta2) * gradient**2)
            mean = first / (1 - settings.beta1**number)
            square = second / (1 - settings.beta2**number)
            self.value -= lr * mean / (square.sqrt() + settings.epsilon * factors.eps)
        else:
            limit = self.config.coordinate_clip.threshold * factors.threshold
            first.mul_(settings.beta1).add_(gradient.clamp(-limit, limit))
            self.value -= lr * first


@pytest.mark.parametrize("rule", ["adamw", "clipped_sgd"])
@pytest.mark.parametrize("family", ["hybrid", "experts"])
def test_updates_are_those_of_every_entry_by_itself(family: str, rule: str) -> None:
    config = recipe(
        family,
        optimizer={"rule": rule, "weight_decay": 0.3, "clip": 0.0, "epsilon": 1e-3},
        mup={"base_layers": 1},
        model={"layers": 2},
    )
    model = model_of(config)
    optimizer, manifest = optimizer_of(model, config), manifest_of(config, VOCABULARY)
    twins = {
        name: [
            Twin(entry, rows, config)
            for entry, rows in zip(entries, rows_of(model, name, entries), strict=True)
        ]
        for name, entries in manifest.by_name.items()
    }
    generator = torch.Generator().manual_seed(3)
    for number in range(1, 4):
        rate = 0.02 / number
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = 1e-3 * noise
            parts = parameter.grad.split([twin.entry.shape[0] for twin in twins[name]])
            for twin, part in zip(twins[name], parts, strict=True):
                twin.step(part.clone(), number, rate)
        set_learning_rate(optimizer, rate)
        check_rates(optimizer, rate)
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = torch.cat([twin.value for twin in twins[name]])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-13, msg=name)


def rows_of(model: nn.Module, name: str, entries: Any) -> tuple[torch.Tensor, ...]:
    """Return the blocks of rows of a parameter."""
    return model.get_parameter(name).detach().split([entry.shape[0] for entry in entries])


def test_flat_buffers_of_a_group_learn_what_its_tensors_learn() -> None:
    """Nothing hangs on parameters: ZeRO's one buffer for a group is updated like its parts."""
    config = recipe("experts")
    whole, flat = model_of(config), model_of(config)
    _, groups = groups_of(config, whole)
    _, parts = groups_of(config, flat)
    buffers = [
        nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]])) for group in parts
    ]
    for group, buffer in zip(parts, buffers, strict=True):
        group["params"] = [buffer]
    generator = torch.Generator().manual_seed(3)
    for group, buffer in zip(groups, buffers, strict=True):
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).double()
        buffer.grad = torch.cat([p.grad.flatten() for p in group["params"]])
    for each in (groups, parts):
        torch.optim.AdamW(each).step()
    for group, buffer in zip(groups, buffers, strict=True):
        learnt = torch.cat([p.detach().flatten() for p in group["params"]])
        assert torch.equal(learnt, buffer.detach())


def scheduled() -> tuple[torch.optim.Optimizer, list[float]]:
    """Return torch's AdamW over groups of muP, and their learning rates at 1e-3."""
    config = recipe(optimizer={"peak_lr": 1e-3})
    _, groups = groups_of(config, model_of(config))
    rates = [group["lr"] for group in groups]
    assert {1e-3, 1e-3 / M} == {*rates}
    return torch.optim.AdamW(groups), rates


class WarmupLR:
    """What DeepSpeed 0.19's scheduler of this name does with one number as its highest rate: it
    gives that number to all groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, highest: float, steps: int) -> None:
        self.optimizer, self.steps, self.done = optimizer, steps, 0
        self.highest = [highest] * len(optimizer.param_groups)

    def step(self) -> None:
        """Set every group's rate."""
        self.done += 1
        share = min(1.0, math.log(self.done + 1) / math.log(self.steps))
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * share


def test_a_scheduler_that_overwrites_groups_is_found_out() -> None:
    optimizer, rates = scheduled()
    check_rates(optimizer, 1e-3)
    scheduler = WarmupLR(optimizer, 1e-3, 10)
    for _ in range(20):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * len(rates)
    wrong = next(number for number, rate in enumerate(rates) if rate != 1e-3)
    with pytest.raises(ValueError) as caught:
        check_rates(optimizer, 1e-3)
    assert str(caught.value) == (
        f"parameter group {wrong} has the learning rate 0.001, and its share 0.25 of 0.001 is "
        "0.00025: something overwrites the rates of groups; schedule by scaling each group's own "
        "rate (torch's LambdaLR does), or with set_learning_rate"
    )


def test_schedulers_that_scale_each_group_keep_the_shares() -> None:
    optimizer, rates = scheduled()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    for step in range(4):
        check_rates(optimizer, 1e-3 / (1.0 + step))
        optimizer.step()
        scheduler.step()
    set_learning_rate(optimizer, 0.5)
    check_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [500 * rate for rate in rates]
    check_rates(optimizer, 0.5 * (1 + 1e-9))
    with pytest.raises(ValueError, match="parameter group 0 has the learning rate"):
        check_rates(optimizer, 0.4)


def test_rates_that_are_tensors_are_seen_as_well() -> None:
    optimizer, _ = scheduled()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    check_rates(optimizer, 1e-3)
    optimizer.param_groups[-1]["lr"].mul_(2.0)
    with pytest.raises(ValueError, match="overwrites"):
        check_rates(optimizer, 1e-3)


def test_a_run_whose_rates_are_overwritten_stops_at_its_next_line(
    tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overwrite(optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    monkeypatch.setattr("interlace.trainer.run.set_learning_rate", overwrite)
    words = (*tiny, "train.steps=4", "observe.log_every_steps=3", "model.kv_heads=2")
    mup = ("mup.enabled=true", "mup.base_width=16")
    assert main(["train", *words, *mup, f"run.dir={tmp_path / 'run'}"]) == 1
    assert "something overwrites the rates of groups" in capsys.readouterr().err
