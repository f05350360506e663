"""Every way to run an update gives the same bits as one update in one piece."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_cases import SIZES, Case, Toy, assert_same_bits, in_one_piece, open_case, train

from interlace.kernels.update import SGD, AdamW
from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.schedule import Home

STRIDE = 3
COUNTS = {1: 10**9, STRIDE - 1: 600, STRIDE: 400, STRIDE + 1: 300, len(SIZES): 1}
"""How many subgroups the toy's parameters make, by elements of a subgroup."""


@functools.cache
def one_piece(**settings: object) -> dict[str, torch.Tensor]:
    return in_one_piece(Case(**settings))


@pytest.mark.parametrize("count", COUNTS)
def test_the_counts_are_what_the_names_say(count: int, profile: HardwareProfile) -> None:
    _, optimizer = open_case(Case(subgroup_elements=COUNTS[count]), profile)
    assert len(optimizer.subgroups) == count
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("strategy", ["none", "host", "stride", "optimal"])
def test_a_strategy_changes_no_bit(
    strategy: str, overlap: str, dtype: torch.dtype, profile: HardwareProfile
) -> None:
    clips = [None] if overlap == "backward" else [None, 1.0]
    for size, clip, accumulation, groups in itertools.product(
        COUNTS.values(), clips, [1, 3], [1, 3]
    ):
        same = {"dtype": dtype, "clip": clip, "accumulation": accumulation, "groups": groups}
        case = Case(
            strategy=strategy, overlap=overlap, subgroup_elements=size, stride=STRIDE, **same
        )
        assert_same_bits(train(case, profile), one_piece(**same), case)


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_other_forms_of_state_are_the_same_in_every_home(
    overlap: str, split: bool, moments: torch.dtype, profile: HardwareProfile
) -> None:
    same = {"dtype": torch.bfloat16, "split_master": split, "moment_dtype": moments}
    resident = train(Case(strategy="none", **same), profile)
    for size in (1, 400):
        case = Case(strategy="optimal", overlap=overlap, subgroup_elements=size, **same)
        assert_same_bits(train(case, profile), resident, case)


def test_a_split_master_is_exact_and_rounds_otherwise_in_exact_halves_only(
    profile: HardwareProfile,
) -> None:
    split = train(Case(dtype=torch.bfloat16, split_master=True, strategy="host", steps=1), profile)
    whole = one_piece(dtype=torch.bfloat16, steps=1)
    for name, expected in whole.items():
        half = torch.zeros(expected.shape, dtype=torch.bool)
        if name.endswith(".weight"):
            half = whole[f"{name}.master"].view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(split[name][~half], expected[~half]), name


@given(
    homes=st.lists(st.sampled_from(Home), min_size=1, max_size=8),
    size=st.integers(1, 900),
    overlap=st.sampled_from(["none", "forward", "backward"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    accumulation=st.sampled_from([1, 2]),
    groups=st.integers(1, 3),
    rule=st.sampled_from(
        [AdamW(lr=0.02, betas=(0.8, 0.9)), SGD(momentum=0.9, weight_decay=0.1), SGD(nesterov=True)]
    ),
    stream=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_homes_change_no_bit(
    homes: list[Home],
    size: int,
    overlap: str,
    dtype: torch.dtype,
    accumulation: int,
    groups: int,
    rule: AdamW | SGD,
    stream: bool,
) -> None:
    same = {"dtype": dtype, "accumulation": accumulation, "groups": groups, "rule": rule}
    # Autograd itself sums the gradients of a parameter that no hook takes over, in its dtype.
    stream = stream or (accumulation > 1 and dtype is torch.bfloat16)
    case = Case(homes=homes, overlap=overlap, subgroup_elements=size, stream=stream, **same)
    assert_same_bits(train(case, load_profile("4xh100-pcie5")), one_piece(**same), case)


@pytest.mark.parametrize("strategy", ["none", "host", "stride", "optimal"])
@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (AdamW(lr=1e-2, weight_decay=0.1), torch.optim.AdamW),
        (SGD(lr=1e-2, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
    ],
    ids=["adamw", "sgd"],
)
def test_fifty_steps_equal_torchs(
    strategy: str,
    rule: AdamW | SGD,
    reference: type[torch.optim.Optimizer],
    profile: HardwareProfile,
) -> None:
    model, optimizer = open_case(Case(strategy=strategy, rule=rule, subgroup_elements=200), profile)
    twin = Toy(torch.float32)
    theirs = reference(twin.parameters(), **rule.hyperparameters())
    for step in range(50):
        for net, updater in ((model, optimizer), (twin, theirs)):
            updater.zero_grad()
            net(0.1 * step).backward()
            updater.step()
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    optimizer.close()
