"""The update kernels on a real GPU against the CPU's."""

from dataclasses import replace

import pytest
import torch
from slab_cases import EACH_CASE, RULES, a_step, copy_of, make_slab, padded, same_bits

from interlace.kernels.update import (
    CoordinateClip,
    UpdateRule,
    accumulate,
    magnitude_histogram,
    quantile_of,
    sum_of_squares,
    update,
    update_many,
)

pytestmark = pytest.mark.gpu


@EACH_CASE
def test_the_gpu_computes_the_cpu_s_bits(rule: UpdateRule, form: str) -> None:
    on_cpu = make_slab(form, rule, 100_003)
    on_gpu = copy_of(on_cpu, "cuda")
    for number in (1, 2, 3):
        cut = update(rule, on_cpu, a_step(rule, number))
        assert int(update(rule, on_gpu, a_step(rule, number))) == cut
    assert same_bits(on_cpu, on_gpu)


@EACH_CASE
def test_on_the_gpu_too_what_is_not_finite_is_guarded_or_carries_over(
    rule: UpdateRule, form: str
) -> None:
    on_cpu = make_slab(form, rule, 5003)
    on_cpu.gradient[::7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0]).repeat(143)
    on_gpu = copy_of(on_cpu, "cuda")
    cut = update(rule, on_cpu, a_step(rule))
    assert int(update(rule, on_gpu, a_step(rule))) == cut
    pairs = zip((on_cpu.master, *on_cpu.moments), (on_gpu.master, *on_gpu.moments), strict=True)
    for one, other in pairs:
        assert torch.equal(one.nan_to_num(7.0), other.cpu().nan_to_num(7.0))


@EACH_CASE
def test_what_lies_beside_a_slab_on_the_gpu_is_not_touched(rule: UpdateRule, form: str) -> None:
    # A margin that leaves the slab unaligned.
    on_cpu = make_slab(form, rule, 10_007)
    on_gpu, intact = padded(on_cpu, "cuda", margin=41)
    update(rule, on_cpu, a_step(rule))
    update(rule, on_gpu, a_step(rule))
    assert same_bits(on_cpu, on_gpu)
    assert intact()


@EACH_CASE
def test_many_slabs_on_the_gpu_are_each_updated_as_alone(rule: UpdateRule, form: str) -> None:
    sizes = [1, 1024, 17, 2**20 + 1, 0, 50_001]
    alone = [make_slab(form, rule, size, seed=n) for n, size in enumerate(sizes)]
    together = [copy_of(slab, "cuda") for slab in alone]
    for turn in (1, 2):
        steps = [
            replace(
                a_step(rule, turn + n % 3),
                first_element=n * 2**31,
                hyper=rule.hyperparameters() | {"lr": 0.1 * n, "threshold": 0.2 * n},
            )
            for n in range(len(sizes))
        ]
        cut = [update(rule, slab, step) for slab, step in zip(alone, steps, strict=True)]
        assert [int(count) for count in update_many(rule, together, steps)] == cut
    assert all(same_bits(one, other) for one, other in zip(alone, together, strict=True))


def test_an_update_on_the_gpu_takes_no_memory_of_its_own_but_a_counter() -> None:
    for rule in RULES.values():
        slab = copy_of(make_slab("bf16", rule, 10_000_000), "cuda")
        update(rule, slab, a_step(rule))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        update(rule, slab, a_step(rule))
        counter = 512 if isinstance(rule, CoordinateClip) else 0
        assert torch.cuda.max_memory_allocated() <= before + counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_histograms_of_magnitudes_are_the_cpu_s(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5_000_003, generator=generator)
    values[:5] = torch.tensor([0.0, torch.nan, torch.inf, 1e-40, -3e38])
    values = values.to(dtype)
    for scale in (1.0, 0.3, 1e-38):
        found = magnitude_histogram(values.cuda(), scale)
        assert found.is_cuda
        assert torch.equal(found.cpu(), magnitude_histogram(values, scale))
        assert quantile_of(found, 0.1) == quantile_of(found.cpu(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [0, 1, 16 * 1024, 30_000_001])
def test_sums_of_squares_repeat_to_the_last_bit(elements: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.randn(elements + 3, generator=generator, device="cuda").to(dtype)[3:]
    expected = sum_of_squares(values.cpu())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = sum_of_squares(values)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-13, atol=0.0)
    assert all(torch.equal(sum_of_squares(values), found) for _ in range(5))
    aligned = torch.empty_like(values).copy_(values)
    assert torch.equal(sum_of_squares(aligned), found)


def test_sums_of_gradients_are_the_cpu_s_and_take_no_memory() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    total = torch.randn(10_000_000, generator=generator, device="cuda")
    values = torch.randn(10_000_000, generator=generator, device="cuda").bfloat16()
    expected = total.cpu()
    accumulate(expected, values.cpu())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    accumulate(total, values)
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(total.cpu(), expected)
