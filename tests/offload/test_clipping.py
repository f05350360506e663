"""Clipped coordinates: thresholds and counts are the same wherever state is and however it is cut.

Twins are the same update in one piece (`offload_cases.in_one_piece`), plain parameters in place of
row blocks, a gradient with zeros in place of what is not finite, and numbers worked out by hand.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from offload_cases import Case, Toy, assert_same_bits, in_one_piece, open_case, train
from torch import nn

from interlace.kernels.update import SGD, AdamW, CoordinateClip, Signum, UpdateRule, clipped_sgd
from interlace.offload import optimizer as optimizer_module
from interlace.offload.clipping import mean_fraction
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import Throttle
from interlace.offload.optimizer import NonFiniteGradient, OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget

FIXED = clipped_sgd(lr=0.01, threshold=0.5, momentum=0.9, weight_decay=0.1)
LAGGED = clipped_sgd(lr=0.01, momentum=0.9, weight_decay=0.1, policy="lagged_quantile")
RULES: dict[str, UpdateRule] = {
    "fixed": FIXED,
    "lagged": LAGGED,
    "no momentum": clipped_sgd(lr=0.01, threshold=0.5, momentum=0.0),
    "global": clipped_sgd(lr=0.01, momentum=0.9, policy="global_quantile"),
    "nesterov": clipped_sgd(lr=0.01, threshold=0.5, nesterov=True),
    "adam": CoordinateClip(AdamW(lr=0.01), share=0.5, policy="lagged_quantile"),
    "update": CoordinateClip(AdamW(lr=0.01), threshold=0.5, stage="update"),
    "signum": Signum(lr=0.01, weight_decay=0.1),
}
EVERY_HOME = tuple(Home)


@functools.cache
def one_piece(rule: str, **settings: object) -> dict[str, torch.Tensor]:
    return in_one_piece(Case(rule=RULES[rule], **settings))


def overlaps(rule: str) -> Sequence[str]:
    return ("none", "forward") if rule == "global" else ("none", "forward", "backward")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["none", "host", "stride", "optimal"])
def test_a_strategy_changes_no_bit(strategy: str, rule: str, profile: HardwareProfile) -> None:
    forms = [(torch.float32, 1, 400), (torch.bfloat16, 3, 1)]
    for overlap, (dtype, accumulation, size) in itertools.product(overlaps(rule), forms):
        same = {"dtype": dtype, "accumulation": accumulation, "groups": 3}
        way = {"strategy": strategy, "overlap": overlap, "subgroup_elements": size, "stride": 3}
        case = Case(rule=RULES[rule], **same, **way)
        assert_same_bits(train(case, profile), one_piece(rule, **same), case)


@pytest.mark.parametrize("rule", ["fixed", "lagged"])
def test_a_momentum_in_bfloat16_is_the_same_in_every_home(
    rule: str, profile: HardwareProfile
) -> None:
    same = {"dtype": torch.bfloat16, "moment_dtype": torch.bfloat16, "rule": RULES[rule]}
    for split in (False, True):
        resident = train(Case(split_master=split, **same), profile)
        for overlap, size in itertools.product(("none", "backward"), (1, 400)):
            case = Case(
                homes=EVERY_HOME,
                overlap=overlap,
                subgroup_elements=size,
                split_master=split,
                **same,
            )
            assert_same_bits(train(case, profile), resident, case)


class Fused(nn.Module):
    """A matrix whose rows are of three kinds, or three matrices; and what pulls at them."""

    ROWS = (3, 4, 1)

    def __init__(self, apart: bool) -> None:
        super().__init__()
        whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        parts = whole.split(self.ROWS) if apart else (whole,)
        self.parts = nn.ParameterList(nn.Parameter(part.clone()) for part in parts)

    def forward(self, pull: torch.Tensor) -> torch.Tensor:
        return (torch.cat(list(self.parts)) * pull).sum()


def settings_of(factors: dict[str, float], rule: UpdateRule) -> dict[str, float]:
    """Return a rule's hyperparameters times the factors of a block."""
    given = rule.hyperparameters()
    return {key: given[key] * factors.get(key, 1.0) for key in ("lr", "weight_decay")} | {
        key: given[key] * factors.get(key, 1.0) for key in ("eps", "threshold") if key in given
    }


@pytest.mark.parametrize("home", EVERY_HOME)
@pytest.mark.parametrize(
    "rule",
    [
        FIXED,
        clipped_sgd(lr=0.01, policy="lagged_quantile", share=0.3),
        CoordinateClip(AdamW(lr=0.01, eps=0.1), threshold=0.5),
        AdamW(lr=0.01, eps=0.1),
    ],
    ids=["fixed", "lagged", "adam", "unclipped"],
)
def test_row_blocks_of_a_tensor_are_updated_as_tensors_of_their_own(
    rule: UpdateRule, home: Home
) -> None:
    blocks = (
        {"rows": 3},
        {"rows": 4, "lr": 0.25, "weight_decay": 4.0, "threshold": 2.0},
        {"rows": 1, "eps": 8.0, "lr": 2.0},
    )
    fused, apart = Fused(apart=False), Fused(apart=True)
    groups = [
        [{"params": list(fused.parts), "row_blocks": blocks}],
        [
            {"params": [part], **settings_of(block, rule)}
            for part, block in zip(apart.parts, blocks, strict=True)
        ],
    ]
    optimizers = [
        OffloadedOptimizer(group, rule, strategy="host", budget=MemoryBudget(10**9, 10**9))
        for group in groups
    ]
    generator = torch.Generator().manual_seed(1)
    for optimizer in optimizers:
        optimizer.rehome([home] * len(optimizer.subgroups))
    for _ in range(4):
        pull = torch.randn(8, 6, generator=generator)
        for model, optimizer in zip((fused, apart), optimizers, strict=True):
            model(pull).backward()
            optimizer.step()
            optimizer.finish_step()
    assert torch.equal(fused.parts[0].detach(), torch.cat([p.detach() for p in apart.parts]))
    whole, parts = (
        optimizers[0].state[fused.parts[0]],
        [optimizers[1].state[p] for p in apart.parts],
    )
    for key in (key for key in whole if key != "step"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts])), key
    for optimizer in optimizers:
        optimizer.close()


def test_row_blocks_that_are_not_the_rows_of_every_parameter_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    for blocks, words in (
        ([{"rows": 3}], r"\[3\] rows are not those of a parameter of shape \(4, 3\)"),
        ([{"rows": 0}, {"rows": 4}], "every block has 1 or more"),
        ([{"rows": 4, "betas": 2.0}], r"\['betas'\] cannot be scaled"),
    ):
        with pytest.raises(ValueError, match=words):
            OffloadedOptimizer([{"params": [weight], "row_blocks": blocks}], FIXED)


Spoil = Callable[[Toy], torch.Tensor]
"""Returns a loss that makes some coordinates of the gradient of a toy not finite."""


def nan_and_infinity(model: Toy) -> torch.Tensor:
    one, other = model.parts[4].weight, model.parts[2].weight
    return one[3].float() * torch.nan + other[5, 1].float() * torch.inf - one[7].float() * torch.inf


def everything(model: Toy) -> torch.Tensor:
    return torch.stack([(part.weight.float() * torch.nan).sum() for part in model.parts]).sum()


@pytest.mark.parametrize("spoil", [nan_and_infinity, everything])
@pytest.mark.parametrize("rule", ["fixed", "lagged", "adam", "global"])
def test_coordinates_that_are_not_finite_count_as_zero_whatever_the_overlap(
    rule: str, spoil: Spoil, profile: HardwareProfile
) -> None:
    """The twin has a gradient with zeros there, set by hand."""
    twin, theirs = open_case(Case(rule=RULES[rule], stream=False), profile)
    for step in range(4):
        (twin(0.1 * step) + (spoil(twin) if step == 2 else 0.0)).backward()
        for p in twin.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        theirs.step()
    for overlap, home in itertools.product(overlaps(rule), (EVERY_HOME, (Home.HOST,))):
        case = Case(rule=RULES[rule], overlap=overlap, homes=home, subgroup_elements=200)
        model, optimizer = open_case(case, profile)
        for step in range(4):
            (model(0.1 * step) + (spoil(model) if step == 2 else 0.0)).backward()
            optimizer.step()
        optimizer.synchronize()
        for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, other), case
            assert torch.isfinite(ours).all()
        optimizer.close()


def test_a_guard_waits_for_no_norm_and_looks_at_no_gradient(
    profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nobody asked for this")

    monkeypatch.setattr(optimizer_module, "global_norm", fail)
    monkeypatch.setattr(optimizer_module, "all_finite", fail)
    for overlap in ("none", "forward", "backward"):
        model, optimizer = open_case(Case(rule=FIXED, overlap=overlap, homes=EVERY_HOME), profile)
        model(0.1).backward()
        optimizer.step()
        optimizer.close()


def test_the_norm_is_that_of_whole_gradients_while_their_updates_are_under_way() -> None:
    norms: list[list[float]] = []
    # The second adds up so slowly that gradients are asked for before they are there.
    for overlap, throttle in (("none", None), ("backward", Throttle(cpu_bytes_per_second=1e5))):
        model = Toy(torch.float32)
        optimizer = OffloadedOptimizer(
            model.parameters(),
            FIXED,
            strategy="host",
            budget=MemoryBudget(10**9, 10**9),
            overlap=overlap,
            options=OffloadOptions(
                subgroup_elements=1, accumulation_steps=2, throttle=throttle, cpu_threads=1
            ),
        )
        norms.append([])
        for step in range(2):
            for micro in range(2):
                model(0.5 * step - micro).backward()
            norms[-1].append(optimizer.gradient_norm())
            if throttle:
                # Sums go before updates: who wants the norm does not wait for all of these.
                waiting = [s for s in optimizer.subgroups if not s.updating[0].complete]
                assert len(waiting) > 4
            optimizer.step()
        optimizer.close()
    assert norms[0] == norms[1]


def test_with_a_norm_to_clip_by_a_bad_gradient_still_stops_the_step(
    profile: HardwareProfile,
) -> None:
    model, optimizer = open_case(Case(rule=FIXED, clip=1.0), profile)
    (model(0.1) + nan_and_infinity(model)).backward()
    with pytest.raises(NonFiniteGradient, match="nothing was updated"):
        optimizer.step()
    optimizer.close()


@pytest.mark.parametrize(
    ("rule", "overlap", "words"),
    [
        (
            clipped_sgd(policy="global_quantile"),
            "backward",
            "policy='global_quantile' with overlap='backward': .* use overlap='forward', or",
        ),
        (
            CoordinateClip(AdamW(), stage="update", policy="lagged_quantile"),
            "none",
            "policy='lagged_quantile' with stage='update': .* use policy='fixed' or stage=",
        ),
    ],
    ids=["global during backward", "quantile of updates"],
)
def test_thresholds_that_cannot_be_known_are_refused(
    rule: CoordinateClip, overlap: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        OffloadedOptimizer(Toy(torch.float32).parameters(), rule, overlap=overlap)


class Pulled(nn.Module):
    """One parameter, whose gradient is what is given."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient).sum()


def pulled(model: Pulled, rule: UpdateRule, accumulation: int = 1) -> OffloadedOptimizer:
    options = OffloadOptions(accumulation_steps=accumulation)
    budget = MemoryBudget(10**9, 10**9)
    return OffloadedOptimizer(
        model.parameters(), rule, strategy="host", budget=budget, options=options
    )


def test_the_first_gradient_is_only_measured_and_one_of_zeros_changes_no_threshold() -> None:
    model = Pulled(4)
    optimizer = pulled(model, clipped_sgd(lr=1.0, momentum=0.0, policy="lagged_quantile"))
    moves, thresholds = [], []
    zeros, ones = torch.zeros(4), torch.ones(4)
    for gradient in (zeros, ones, 100 * ones, zeros, 100 * ones):
        before = model.weight.detach().clone()
        model(gradient).backward()
        optimizer.step()
        optimizer.finish_step()
        moves.append(float((before - model.weight).detach().abs().max()))
        thresholds.append(float(optimizer.state[model.weight]["threshold"]))
    # A histogram has eight bins for each power of two: a quantile is good to an eighth.
    assert thresholds[0] == 0.0
    assert thresholds[1] == pytest.approx(1.0, rel=1 / 8)
    assert thresholds[2] == thresholds[3] == pytest.approx(100.0, rel=1 / 8)
    # Each step is cut at the threshold of the step before.
    assert moves[:2] == [0.0, 0.0]
    assert moves[2:] == pytest.approx([thresholds[1], 0.0, min(100.0, thresholds[3])])
    optimizer.close()


def test_who_reads_the_state_during_a_step_does_not_take_its_thresholds_away(
    profile: HardwareProfile,
) -> None:
    learnt: list[list[float]] = []
    for reads in (False, True):
        case = Case(rule=LAGGED, strategy="host", overlap="backward", subgroup_elements=1)
        model, optimizer = open_case(case, profile)
        for step in range(3):
            model(0.5 * step).backward()
            if reads:
                optimizer.state_dict()
            optimizer.step()
        optimizer.finish_step()
        learnt.append([float(optimizer.state[p]["threshold"]) for p in model.parameters()])
        assert all(share > 0.0 for share in optimizer.clip_fractions().values())
        optimizer.close()
    assert learnt[0] == learnt[1]
    assert min(learnt[0]) > 0.0


def test_rows_of_an_embedding_that_are_used_seldom_do_not_freeze() -> None:
    model = Pulled(100, 8)
    optimizer = pulled(model, clipped_sgd(lr=1.0, momentum=0.0, policy="lagged_quantile"))
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        gradient = torch.zeros(100, 8)
        gradient[20 * step : 20 * step + 3] = torch.rand(3, 8, generator=generator) + 0.5
        model(gradient).backward()
        optimizer.step()
    optimizer.finish_step()
    moved = model.weight.detach().abs()
    used = [20 * step + row for step in range(1, 5) for row in range(3)]
    assert bool((moved[used] > 0.4).all())
    assert int((moved > 0).any(1).sum()) == len(used)
    optimizer.close()


@pytest.mark.parametrize("policy", ["fixed", "lagged_quantile", "global_quantile"])
def test_how_a_batch_is_cut_into_passes_changes_no_bit(policy: str) -> None:
    """Gradients are multiples of 2**-10, so that sums are exact in any order."""
    results = []
    for passes in (1, 2, 4):
        model = Pulled(40)
        rule = clipped_sgd(lr=0.1, threshold=0.01, policy=policy)
        optimizer = pulled(model, rule, passes)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            rows = torch.randint(-50, 51, (4, 40), generator=generator) / 2.0**10
            for part in rows.split(4 // passes):
                (model(part.mean(0)) / passes).backward()
            optimizer.step()
        optimizer.finish_step()
        results.append([model.weight.detach(), *optimizer.state[model.weight].values()])
        optimizer.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rule", ["lagged", "adam", "no momentum"])
@pytest.mark.parametrize("after", ["none", "optimal"])
def test_a_state_dict_carries_thresholds_to_another_strategy(
    after: str, rule: str, profile: HardwareProfile
) -> None:
    same = {"groups": 3, "dtype": torch.bfloat16, "rule": RULES[rule]}
    model, first = open_case(Case(strategy="host", subgroup_elements=100, **same), profile)
    for step in range(3):
        model(0.5 * step).backward()
        first.step()
    saved, values = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    twin, second = open_case(Case(strategy=after, subgroup_elements=300, **same), profile)
    twin.load_state_dict(values)
    second.load_state_dict(saved)
    for step in range(3, 6):
        for net, optimizer in ((model, first), (twin, second)):
            net(0.5 * step).backward()
            optimizer.step()
            optimizer.finish_step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        kept = [key for key in first.state[p] if key not in ("master", "remainder")]
        assert ("threshold" in kept) == (rule != "no momentum")
        assert all(torch.equal(first.state[p][key], second.state[q][key]) for key in kept)
    first.close()
    second.close()


def test_thresholds_of_other_row_blocks_are_refused() -> None:
    model = Pulled(4)
    optimizer = pulled(model, LAGGED)
    saved = optimizer.state_dict()
    state = {"step": torch.tensor(1.0), "momentum_buffer": torch.zeros(4)}
    saved["state"] = {0: {**state, "threshold": torch.ones(2)}}
    with pytest.raises(ValueError, match=r"thresholds of shape \(2,\) .* with 1 row block"):
        optimizer.load_state_dict(saved)
    # What comes from a rule with a fixed threshold has none: they are learnt anew.
    saved["state"] = {0: state}
    optimizer.load_state_dict(saved)
    assert optimizer.state[model.weight]["threshold"].tolist() == [0.0]
    optimizer.close()


def test_momentum_that_there_is_no_buffer_for_is_refused_before_an_update() -> None:
    first, second = pulled(Pulled(4), LAGGED), pulled(Pulled(4), RULES["no momentum"])
    with pytest.raises(ValueError, match=r"momentum=0\.9, and .* make it with momentum=0\.9"):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["momentum"] == 0.0
    first.close()
    second.close()


@pytest.mark.parametrize("homes", [(Home.HOST,), (Home.STAGED,), (Home.RESIDENT,), EVERY_HOME])
def test_what_was_clipped_is_counted_for_every_parameter(
    homes: Sequence[Home], profile: HardwareProfile
) -> None:
    for overlap in ("none", "backward"):
        case = Case(rule=FIXED, homes=homes, overlap=overlap, subgroup_elements=200)
        model, optimizer = open_case(case, profile)
        assert optimizer.clip_fractions() == {}
        used = [part for number, part in enumerate(model.parts) if number != 3]
        torch.stack([part(0.1) for part in used]).sum().backward()
        gradients = {p: g.clone() for p, g in optimizer.gradients()}
        optimizer.step()
        optimizer.finish_step()
        expected = {p: float((g.abs() > 0.5).double().mean()) for p, g in gradients.items()}
        assert optimizer.clip_fractions() == expected
        assert 0.1 < mean_fraction(expected) < 0.99
        (model(0.1) + nan_and_infinity(model)).backward()
        # Until a step is over, the newest that is finished is the one before.
        assert optimizer.clip_fractions() == expected
        optimizer.step()
        optimizer.finish_step()
        assert len(optimizer.clip_fractions()) == len(model.parts)
        optimizer.close()


def test_clipped_gradient_descent_without_momentum_keeps_no_state(
    profile: HardwareProfile,
) -> None:
    for rule, expected in ((RULES["no momentum"], 0), (FIXED, 4), (AdamW(), 8)):
        model, optimizer = open_case(Case(rule=rule), profile)
        elements = sum(p.numel() for p in model.parameters())
        held = sum(s.numel() * 4 for g in optimizer.subgroups for s in g.slabs.values())
        assert held == expected * elements
        optimizer.close()


def test_a_threshold_of_infinity_is_torchs_gradient_descent(profile: HardwareProfile) -> None:
    rule = clipped_sgd(lr=0.01, threshold=math.inf, momentum=0.9)
    case = Case(homes=EVERY_HOME, subgroup_elements=200, overlap="backward", rule=rule)
    model, optimizer = open_case(case, profile)
    twin = Toy(torch.float32)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    for step in range(20):
        for net, updater in ((model, optimizer), (twin, theirs)):
            updater.zero_grad()
            net(0.1 * step).backward()
            updater.step()
    optimizer.synchronize()
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    optimizer.close()
    assert isinstance(rule.rule, SGD)
