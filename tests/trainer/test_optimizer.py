"""The optimizer of a recipe against plain formulas in fp64, and its schedule."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from interlace.offload.hardware import load_profile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.schedule import NOTHING_HIDDEN
from interlace.trainer.config.schema import OptimizerSection, RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.optimizer import build_optimizer, set_learning_rate
from interlace.trainer.schedules import learning_rate


class Small(nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))


def optimizer_of(model: nn.Module, budget: int = 10**9, **settings: object) -> OffloadedOptimizer:
    config = RunConfig.model_validate({"optimizer": settings})
    placement = SimpleNamespace(
        device_budget_bytes=budget,
        host_budget_bytes=budget,
        overlap="none",
        hidden_window=NOTHING_HIDDEN,
    )
    plan = SimpleNamespace(offload=placement, accumulation=1)
    return build_optimizer(model, config, plan, load_profile("4xh100-pcie5"))


def test_adamw_equals_its_formula_and_decays_matrices_only() -> None:
    model, settings = Small(), OptimizerSection(weight_decay=0.3, clip=0.0)
    optimizer = optimizer_of(model, weight_decay=0.3, clip=0.0)
    generator = torch.Generator().manual_seed(1)
    twins = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in twins.items()}
    second = {name: torch.zeros_like(p) for name, p in twins.items()}
    for step in range(1, 21):
        rate = 0.01 / step
        for name, parameter in model.named_parameters():
            g = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = g.clone()
            first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * g
            second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * g**2
            decay = settings.weight_decay or 0.0 if parameter.ndim == 2 else 0.0
            m = first[name] / (1 - settings.beta1**step)
            v = second[name] / (1 - settings.beta2**step)
            twins[name] = twins[name] * (1 - rate * decay)
            twins[name] = twins[name] - rate * m / (v.sqrt() + settings.epsilon)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), twins[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_equals_torchs(limit: float) -> None:
    ours, theirs = Small(), Small()
    optimizer = optimizer_of(ours, clip=limit, weight_decay=0.0)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    for scale in (1.0, 0.01, 3.0):
        for model in (ours, theirs):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, scale * (1.0 + number))
        norm = optimizer.gradient_norm()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
        assert norm == pytest.approx(float(expected), rel=1e-12)
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_state_that_does_not_fit_is_a_user_s_problem_with_the_setting_to_change() -> None:
    with pytest.raises(ConfigError, match=r"offload\.device_budget_gib"):
        optimizer_of(Small(), budget=10)


def rates(steps: int, **settings: object) -> list[float]:
    section = OptimizerSection.model_validate({"peak_lr": 1.0, "warmup_steps": 4, **settings})
    return [learning_rate(step, steps, section) for step in range(steps)]


def test_warmup_rises_to_the_peak_and_a_constant_stays() -> None:
    assert rates(8, schedule="constant") == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_wsd_falls_along_a_line_at_the_end() -> None:
    given = rates(20, schedule="wsd", decay_fraction=0.5, final_lr_fraction=0.1)
    assert given[4:11] == [1.0] * 7
    falls = [1 - 0.09 * n for n in range(1, 10)]
    assert given[11:] == pytest.approx(falls)


def test_cosine_is_half_a_wave() -> None:
    given = rates(14, schedule="cosine", final_lr_fraction=0.2)
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * n / 10)) for n in range(10)]
    assert given[4:] == pytest.approx(expected)


def test_a_run_shorter_than_its_warmup_never_leaves_it() -> None:
    given = rates(5, schedule="wsd", decay_fraction=0.4, warmup_steps=20)
    assert given == pytest.approx([n / 21 for n in range(1, 6)])
    assert all(rate > 0 for rate in given)
