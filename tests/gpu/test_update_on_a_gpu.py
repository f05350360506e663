"""The update kernels on a real GPU against the CPU's."""

import pytest
from slab_cases import FORMS, RULES, a_step, copy_of, make_slab, same_bits

from interlace.kernels.update import UpdateRule, update

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES, ids=["adamw", "sgd", "nesterov"])
def test_the_gpu_computes_the_cpu_s_bits(rule: UpdateRule, form: str) -> None:
    on_cpu = make_slab(form, rule, 100_003)
    on_gpu = copy_of(on_cpu, "cuda")
    for number in (1, 2, 3):
        update(rule, on_cpu, a_step(rule, number))
        update(rule, on_gpu, a_step(rule, number))
    assert same_bits(on_cpu, on_gpu)
