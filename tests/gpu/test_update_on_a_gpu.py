"""The update kernels on a real GPU against the CPU's."""

from dataclasses import replace

import pytest
import torch
from slab_cases import FORMS, RULES, a_step, copy_of, make_slab, padded, same_bits

from interlace.kernels.update import UpdateRule, accumulate, sum_of_squares, update, update_many

pytestmark = pytest.mark.gpu
EACH_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.mark.parametrize("form", FORMS)
@EACH_RULE
def test_the_gpu_computes_the_cpu_s_bits(rule: UpdateRule, form: str) -> None:
    on_cpu = make_slab(form, rule, 100_003)
    on_gpu = copy_of(on_cpu, "cuda")
    for number in (1, 2, 3):
        update(rule, on_cpu, a_step(rule, number))
        update(rule, on_gpu, a_step(rule, number))
    assert same_bits(on_cpu, on_gpu)


@pytest.mark.parametrize("form", FORMS)
@EACH_RULE
def test_what_lies_beside_a_slab_on_the_gpu_is_not_touched(rule: UpdateRule, form: str) -> None:
    # A margin that leaves the slab unaligned.
    on_cpu = make_slab(form, rule, 10_007)
    on_gpu, intact = padded(on_cpu, "cuda", margin=41)
    update(rule, on_cpu, a_step(rule))
    update(rule, on_gpu, a_step(rule))
    assert same_bits(on_cpu, on_gpu)
    assert intact()


@pytest.mark.parametrize("form", FORMS)
@EACH_RULE
def test_many_slabs_on_the_gpu_are_each_updated_as_alone(rule: UpdateRule, form: str) -> None:
    sizes = [1, 1024, 17, 2**20 + 1, 0, 50_001]
    alone = [make_slab(form, rule, size, seed=n) for n, size in enumerate(sizes)]
    together = [copy_of(slab, "cuda") for slab in alone]
    for number in (1, 2):
        steps = [replace(a_step(rule, number), first_element=n * 2**31) for n in range(len(sizes))]
        for slab, step in zip(alone, steps, strict=True):
            update(rule, slab, step)
        update_many(rule, together, steps)
    assert all(same_bits(one, other) for one, other in zip(alone, together, strict=True))


def test_an_update_on_the_gpu_takes_no_memory_of_its_own() -> None:
    for rule in RULES.values():
        slab = copy_of(make_slab("bf16", rule, 10_000_000), "cuda")
        update(rule, slab, a_step(rule))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        update(rule, slab, a_step(rule))
        assert torch.cuda.max_memory_allocated() == before


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
