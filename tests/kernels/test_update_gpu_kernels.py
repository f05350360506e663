"""The GPU's update kernels in Triton's interpreter: the CPU's bits, the CPU's bytes, and nothing
touched beside them.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter_cases import counted_bytes, shuffled_programs
from slab_cases import EACH_CASE, RULES, a_step, copy_of, make_slab, padded, same_bits

from interlace.kernels.update import CoordinateClip, Slab, Step, UpdateRule, sum_of_squares, update
from interlace.offload.schedule import Footprint

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves"
)
ROOT = Path(__file__).resolve().parents[2]


def update_by_triton(rule: UpdateRule, slab: Slab, number: int = 3) -> int:
    from interlace.kernels.update.gpu import update_on_gpu

    step = a_step(rule, number)
    return int(update_on_gpu(rule, slab, step, step.first_element))


@contextmanager
def undefined_where_masked() -> Iterator[None]:
    """Fill what masks leave out of loads with NaN inside, where a GPU leaves anything; for kernels
    that name no other value.
    """
    with counted_bytes() as memory:
        load = memory.load

        def poisoned(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            loaded = load(pointers, mask, other, dtype)
            loaded.view(f"u{loaded.itemsize}")[~mask] = 2 ** (8 * loaded.itemsize) - 1
            return loaded

        memory.load = poisoned
        yield


@EACH_CASE
def test_the_bits_are_the_cpu_s(rule: UpdateRule, form: str) -> None:
    for elements in (1, 1023, 1024, 2500):
        ours = make_slab(form, rule, elements)
        theirs = copy_of(ours)
        cut = update(rule, ours, a_step(rule))
        assert update_by_triton(rule, theirs) == cut
        assert same_bits(ours, theirs)


@EACH_CASE
def test_the_order_of_programs_and_what_lies_beside_the_slab_do_not_matter(
    rule: UpdateRule, form: str
) -> None:
    ours = make_slab(form, rule, 3 * 1024 + 17)
    theirs, intact = padded(ours)
    cut = update(rule, ours, a_step(rule))
    with shuffled_programs(seed=1), undefined_where_masked():
        assert update_by_triton(rule, theirs) == cut
    assert same_bits(ours, theirs)
    assert intact()


# The interpreter's numpy warns of what a GPU does quietly.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_is_not_finite_is_guarded_or_carries_over_as_on_the_cpu(rule: UpdateRule) -> None:
    ours = make_slab("fp32 in place", rule, 1100)
    ours.gradient[::11] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0]).repeat(20)
    theirs = copy_of(ours)
    cut = update(rule, ours, a_step(rule))
    assert update_by_triton(rule, theirs) == cut
    pairs = zip((ours.master, *ours.moments), (theirs.master, *theirs.moments), strict=True)
    assert all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in pairs)
    assert bool(ours.master.isfinite().all()) == (
        isinstance(rule, CoordinateClip) or rule.name == "signum"
    )


@EACH_CASE
def test_many_slabs_in_one_launch_are_each_updated_as_alone(rule: UpdateRule, form: str) -> None:
    from interlace.kernels.update.gpu import update_many_on_gpu

    sizes = [1, 1024, 17, 2049, 1025]
    alone = [make_slab(form, rule, size, seed=n) for n, size in enumerate(sizes)]
    together, intact = zip(*(padded(slab) for slab in alone), strict=True)
    steps = steps_that_differ(rule)
    cut = [update(rule, slab, step) for slab, step in zip(alone, steps, strict=True)]
    with counted_bytes() as memory, shuffled_programs(seed=3):
        found = update_many_on_gpu(rule, together, steps)
    assert [int(count) for count in found] == cut
    assert all(same_bits(one, other) for one, other in zip(alone, together, strict=True))
    assert all(untouched() for untouched in intact)
    slab = alone[0]
    tensors = (slab.gradient, slab.master, *slab.moments, slab.remainder)
    read = sum(tensor.element_size() for tensor in tensors if tensor is not None)
    blocks = sum(-(-size // 1024) for size in sizes)
    # Beside the slabs, for each block a row of addresses and one of scalars.
    entries, scalars = (9, 12) if rule.name == "adamw" else (8, 9)
    assert memory.loaded == sum(sizes) * read + (8 * entries + 4 * scalars) * blocks


def steps_that_differ(rule: UpdateRule) -> list[Step]:
    """Return five steps of different numbers and hyperparameters, and positions beyond 32 bits."""
    step = a_step(rule)
    changes: list[dict[str, float]] = [
        {},
        {"lr": 0.5, "weight_decay": 0.3},
        {"eps": 0.1, "threshold": 0.1},
        {"threshold": torch.inf, "lr": 2.0},
        {},
    ]
    return [
        Step(number, scale, step.hyper | change, seed, position)
        for change, number, scale, seed, position in zip(
            changes,
            (3, 1, 3, 700, 3),
            (0.7, 0.7, 1.0, 0.7, 0.7),
            (1, 1, 2, 1, 1),
            (0, 5, 2**31, 2**32 - 7, 2**32 + 1),
            strict=True,
        )
    ]


@EACH_CASE
def test_every_byte_moves_once_as_on_the_cpu(rule: UpdateRule, form: str) -> None:
    elements = 1500
    slab = make_slab(form, rule, elements)
    size = {
        "gradient": slab.gradient.element_size(),
        "state": slab.master.element_size()
        + sum(moment.element_size() for moment in slab.moments)
        + (0 if slab.remainder is None else slab.remainder.element_size()),
        "weight": 0 if slab.weight is None else slab.weight.element_size(),
    }
    footprint = Footprint(**size, weight_is_master=slab.weight is None)
    with counted_bytes() as memory:
        update_by_triton(rule, slab)
    assert memory.loaded == elements * (size["gradient"] + size["state"])
    assert memory.stored == elements * (size["state"] + size["weight"])
    assert memory.loaded + memory.stored == elements * footprint.host_update
    assert footprint.device_update == footprint.host_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [1, 1000, 16 * 1024, 40_001])
def test_sums_of_squares_read_every_element_once(elements: int, dtype: torch.dtype) -> None:
    from interlace.kernels.update.gpu import sum_of_squares_on_gpu

    generator = torch.Generator().manual_seed(elements)
    values = torch.randn(elements + 6, generator=generator).to(dtype)
    values[:3] = values[-3:] = torch.nan
    with counted_bytes() as memory, shuffled_programs(seed=2):
        found = sum_of_squares_on_gpu(values[3:-3])
    expected = values[3:-3].double().square().sum()
    assert found.dtype == torch.float64 and found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(found, sum_of_squares(values[3:-3]), rtol=1e-13, atol=0.0)
    assert memory.loaded == elements * dtype.itemsize
    assert memory.stored == 8 * -(-elements // (16 * 1024))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_sums_of_squares_carry_over_what_is_not_finite(bad: float) -> None:
    from interlace.kernels.update.gpu import sum_of_squares_on_gpu

    for dtype in (torch.float32, torch.bfloat16):
        values = torch.ones(20_000, dtype=dtype)
        values[17_777] = bad
        assert not bool(torch.isfinite(sum_of_squares_on_gpu(values)))


def test_the_sum_of_squares_of_nothing_is_zero() -> None:
    from interlace.kernels.update.gpu import sum_of_squares_on_gpu

    assert float(sum_of_squares_on_gpu(torch.empty(0))) == 0.0


COMPILE = """
import re
from compile_cases import ptx_of
from interlace.kernels.update import gpu
integers = {"count": "i32", "position": "i32", "key1": "i32", "key2": "i32"}
tables = {"table": "*i64", "scalars": "*i32", "counter": "*i64"}
state = {"gradient": "*bf16", "master": "*fp32", "first": "*fp32", "second": "*fp32"}
state |= {"buffer": "*fp32", "weight": "*bf16", "remainder": "*i16"}
block = {"block": gpu.BLOCK}
plain = {"split": False, "writes": True, "many": False, "stage": 0, **block}
momentum = {"signs": False, "keeps": True, **plain}
cases = [
    (gpu.adamw, plain),
    (gpu.adamw, plain | {"many": True, "stage": 1}),
    (gpu.adamw, plain | {"stage": 1}),
    (gpu.adamw, plain | {"stage": 2}),
    (gpu.sgd, momentum),
    (gpu.sgd, momentum | {"many": True, "stage": 2}),
    (gpu.sgd, momentum | {"stage": 1}),
    (gpu.sgd, momentum | {"stage": 2, "signs": True}),
    (gpu.sgd, momentum | {"stage": 1, "keeps": False}),
]
types = state | integers | tables
sums = {"values": "*bf16", "partial": "*fp64", "count": "i32"}
for capability in (90, 80):
    for kernel, constants in cases:
        if capability == 80 and constants["stage"]:
            continue
        options = {"enable_fp_fusion": False}
        ptx = ptx_of(kernel, types, constants, capability=capability, options=options)
        wide = [len(re.findall(rf"{way}.global.v4.b32", ptx)) for way in ("ld", "st")]
        fused = len(re.findall(r"fma.rn.f32|(?:div|sqrt).(?:approx|full)", ptx))
        names = [name for name in ("many", "stage", "signs") if constants.get(name)]
        counts = len(re.findall(r"(?:atom|red)\\S*.add.u64", ptx))
        print(kernel.__name__, *names, *wide, fused, counts)
    ptx = ptx_of(gpu.squares, sums, {"turns": 4, **block}, capability=capability, options={})
    print("squares", len(re.findall("ld.global.v4.b32", ptx)))
"""


def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    # A block of 1024 elements on 128 threads: 8 each, 16 bytes of bfloat16 or twice that of fp32.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cases")]),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = [
        # Gradient and three of state in; three of state and the weight out: 28 bytes an element.
        # Nothing fused; with a clip one addition to a counter, for whole blocks and for the last.
        "adamw 7 7 0 0",
        "adamw many stage 0 0 0 2",
        "adamw stage 7 7 0 2",
        "adamw stage 7 7 0 2",
        "sgd 5 5 0 0",
        "sgd many stage 0 0 0 2",
        "sgd stage 5 5 0 2",
        "sgd stage signs 5 5 0 2",
        # No momentum, and no state but the master.
        "sgd stage 3 3 0 2",
        "squares 4",
    ]
    without_clip = [line for line in expected if "stage" not in line]
    assert done.stdout.splitlines() == expected + without_clip, done.stderr[-2000:]
