"""Update kernels against the plain formula in fp64, against torch, and against themselves."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slab_cases import CASES, EACH_CASE, FORMS, a_step, copy_of, make_slab, same_bits

from interlace.kernels.update import (
    SGD,
    AdamW,
    Slab,
    Step,
    UpdateRule,
    merge_master,
    split_master,
    sum_of_squares,
    update,
    update_many,
)
from interlace.kernels.update.api import form_of


@EACH_CASE
def test_one_update_is_the_formula(rule: UpdateRule, form: str) -> None:
    slab, step = make_slab(form, rule, 5000), a_step(rule)
    whole = slab.master if slab.remainder is None else merge_master(slab.master, slab.remainder)
    weight = whole.double()
    moments = tuple(moment.double() for moment in slab.moments)
    gradient = slab.gradient.double() * step.gradient_scale
    rule.plain(weight, gradient, moments, step.number, step.hyper)
    update(rule, slab, step)
    result = slab.master if slab.remainder is None else merge_master(slab.master, slab.remainder)
    moved, expected_weight = result.double(), weight
    if rule.name == "signum" and moments:
        # A sum that cancels has a sign in fp64 that fp32 cannot know.
        clear = moments[0].abs() > 1e-6
        assert bool((~clear).sum() <= 2)
        moved, expected_weight = moved[clear], weight[clear]
    torch.testing.assert_close(moved, expected_weight, rtol=2e-6, atol=2e-6)
    # One bf16 step up or down where moments are rounded stochastically.
    for moment, expected in zip(slab.moments, moments, strict=True):
        tolerance = 2e-6 if moment.dtype is torch.float32 else 2**-7
        torch.testing.assert_close(moment.double(), expected, rtol=tolerance, atol=1e-6)
    if slab.weight is not None:
        assert torch.equal(slab.weight, result.to(slab.weight.dtype))


def test_fp64_slabs_follow_the_plain_formula() -> None:
    rule, step = AdamW(), a_step(AdamW())
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(4)]
    expected = [tensor.clone() for tensor in tensors]
    update(rule, Slab(tensors[0], tensors[1], (tensors[2], tensors[3])), step)
    rule.plain(expected[1], expected[0] * 0.7, (expected[2], expected[3]), 3, step.hyper)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


class OwnAdamW(AdamW):
    """A rule of somebody's own: it has a formula, and no kernels."""


class OwnSGD(SGD):
    """Likewise."""


@pytest.mark.parametrize("form", FORMS)
def test_a_rule_without_kernels_is_served_by_its_formula(form: str) -> None:
    slab, step = make_slab(form, AdamW(), 5000), a_step(AdamW())
    kernel, formula = copy_of(slab), copy_of(slab)
    update(AdamW(), kernel, step)
    update(OwnAdamW(), formula, step)
    pairs = zip((kernel.master, *kernel.moments), (formula.master, *formula.moments), strict=True)
    for one, other in pairs:
        tolerance = 2e-6 if one.dtype is torch.float32 else 2**-7
        torch.testing.assert_close(one, other, rtol=tolerance, atol=2e-6)
    if formula.weight is not None:
        assert torch.equal(formula.weight, formula.master.to(formula.weight.dtype))
    pieces = copy_of(slab)
    for start, stop in ((0, 7), (7, 4000), (4000, 5000)):
        update(OwnAdamW(), pieces, step, start=start, stop=stop)
    assert same_bits(pieces, formula)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_around_a_formula_rounds_as_the_kernels_do(form: str) -> None:
    # With these constants the arithmetic is exact, so that only rounding can differ.
    rule = {"lr": 0.0, "momentum": 1.0, "weight_decay": 0.0}
    slab, step = make_slab(form, SGD(), 5000), Step(3, 1.0, SGD(**rule).hyperparameters(), 7, 99)
    slab.gradient[3:9] = torch.tensor([1e38, -1e38, 3e38, 1e-40, -1e-40, 0.0])
    slab.gradient[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    kernel, formula = copy_of(slab), copy_of(slab)
    update(SGD(**rule), kernel, step)
    update(OwnSGD(**rule), formula, step)
    assert same_bits_of_numbers(kernel, formula)


def same_bits_of_numbers(one: Slab, other: Slab) -> bool:
    """Whether two slabs hold the same; what is not a number, anywhere in both."""
    pairs = [(one.master, other.master), *zip(one.moments, other.moments, strict=True)]
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (AdamW(lr=1e-2, weight_decay=0.1), torch.optim.AdamW),
        (SGD(lr=1e-2, weight_decay=0.1), torch.optim.SGD),
        (SGD(lr=1e-2, nesterov=True), torch.optim.SGD),
    ],
    ids=["adamw", "sgd", "nesterov"],
)
def test_fifty_updates_equal_torchs(rule: UpdateRule, theirs: type[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, generator=generator)
    twin = torch.nn.Parameter(weight.clone())
    reference = theirs([twin], **rule.hyperparameters())
    moments = tuple(torch.zeros(300) for _ in rule.moments)
    for number in range(1, 51):
        gradient = torch.randn(300, generator=generator)
        twin.grad = gradient.clone()
        reference.step()
        update(rule, Slab(gradient, weight, moments), Step(number, 1.0, rule.hyperparameters()))
    torch.testing.assert_close(weight, twin.detach(), rtol=1e-6, atol=1e-6)


@given(
    case=st.sampled_from(list(CASES.values())),
    elements=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_cutting_a_slab_changes_no_bit(
    case: tuple[UpdateRule, str], elements: int, cuts: list[int]
) -> None:
    rule, form = case
    whole = make_slab(form, rule, elements)
    pieces = copy_of(whole)
    step = a_step(rule)
    update(rule, whole, step)
    edges = sorted({0, elements, *(cut for cut in cuts if cut < elements)})
    for start, stop in itertools.pairwise(edges):
        update(rule, pieces, step, start=start, stop=stop)
    assert same_bits(whole, pieces)


def any_bits(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32)


def test_weights_round_to_nearest_even_as_torchs_do() -> None:
    bits = any_bits(200_000)
    halves = (torch.arange(-32768, 32768, dtype=torch.int32) << 16) + 0x8000
    special = torch.tensor([0, 1, -1, 0x7F800000, 0x7F7FFFFF, 0x7FC00001, 0x7F800001])
    values = torch.cat([bits, halves, special.to(torch.int32)]).view(torch.float32)
    # A rate of 0 leaves the master as it is and rounds it.
    rule = AdamW(lr=0.0)
    weight = torch.zeros(values.numel(), dtype=torch.bfloat16)
    zeros = torch.zeros_like(values)
    slab = Slab(zeros, values.clone(), (zeros.clone(), zeros.clone()), weight)
    update(rule, slab, Step(1, 1.0, rule.hyperparameters()))
    expected = values.to(torch.bfloat16)
    finite = ~values.isnan()
    assert torch.equal(weight[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert bool(weight[~finite].isnan().all())


def test_a_split_master_is_exact_for_every_kind_of_number() -> None:
    bits = any_bits(300_000)
    halves = (torch.arange(-32768, 32768, dtype=torch.int32) << 16) + 0x8000
    values = torch.cat([bits, halves]).view(torch.float32)
    high, remainder = split_master(values)
    assert (high.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    merged = merge_master(high, remainder)
    assert torch.equal(merged.view(torch.int32), values.view(torch.int32))


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    rule = SGD(momentum=1.0, lr=0.0)
    count = 1_000_000
    # Between 1 and the next bfloat16, 1 + 2**-7, a quarter of the way up.
    gradient = torch.full((count,), 0.25 * 2**-7)
    first, again, other = (torch.ones(count, dtype=torch.bfloat16) for _ in range(3))
    for buffer, number in ((first, 5), (again, 5), (other, 6)):
        slab = Slab(gradient, torch.zeros(count), (buffer,))
        update(rule, slab, Step(number, 1.0, rule.hyperparameters()))
    up = float((first > 1).float().mean())
    # Four standard deviations of a binomial share.
    assert abs(up - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_squares_are_fp64_sums(dtype: torch.dtype) -> None:
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.double().square().sum()
    torch.testing.assert_close(sum_of_squares(values), expected, rtol=1e-13, atol=0.0)
    # Not aligned, and the same to the last bit.
    shifted = torch.cat([values[:3], values])[3:]
    assert torch.equal(sum_of_squares(values), sum_of_squares(shifted))
    for bad in (torch.inf, torch.nan):
        values[77] = bad
        assert not bool(torch.isfinite(sum_of_squares(values)))


def test_the_gil_is_free_while_a_kernel_runs() -> None:
    rule = AdamW()
    slab = make_slab("bf16", rule, 20_000_000)
    update(rule, slab, a_step(rule), stop=10)
    turns, running = [0], threading.Event()

    def count() -> None:
        running.set()
        while running.is_set():
            turns[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    running.wait()
    before = turns[0]
    for number in range(3):
        update(rule, slab, a_step(rule, number + 1))
    during = turns[0] - before
    running.clear()
    counter.join()
    # With the GIL held there would be a handful of turns per call.
    assert during > 10_000


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gradient": torch.zeros(4, dtype=torch.float16)}, TypeError, "gradient has dtype"),
        ({"master": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "master has dtype"),
        ({"master": torch.zeros(5)}, ValueError, "master has shape (5,)"),
        ({"moments": (torch.zeros(4),)}, ValueError, "rule adamw keeps"),
        ({"weight": torch.zeros(8)[::2]}, ValueError, "weight has shape"),
        ({"gradient": torch.zeros(2, 2)}, ValueError, "1-D"),
    ],
)
def test_a_wrong_slab_is_refused_in_words(
    change: dict[str, torch.Tensor], error: type[Exception], words: str
) -> None:
    parts = {
        "gradient": torch.zeros(4),
        "master": torch.zeros(4),
        "moments": (torch.zeros(4), torch.zeros(4)),
    }
    with pytest.raises(error) as caught:
        update(AdamW(), Slab(**(parts | change)), a_step(AdamW()))
    assert words in str(caught.value)


def test_many_updates_are_those_of_each() -> None:
    rule = AdamW(lr=0.01)
    forms = ["bf16", "split master", "bf16"]
    alone = [make_slab(form, rule, 50 * n, seed=n) for n, form in enumerate(forms)]
    together = [copy_of(slab) for slab in alone]
    steps = [a_step(rule, number) for number in (1, 2, 1)]
    for slab, step in zip(alone, steps, strict=True):
        update(rule, slab, step)
    update_many(rule, together, steps)
    assert all(same_bits(one, other) for one, other in zip(alone, together, strict=True))


def test_a_launch_is_shared_by_slabs_of_one_form() -> None:
    def forms(*names: str) -> int:
        return len({form_of(make_slab(name, AdamW(), 4)) for name in names})

    assert forms("bf16", "bf16") == 1
    assert forms("bf16", "split master", "bf16 moments", "fp32 in place") == 4
