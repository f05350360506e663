"""The engine on a real device: streams and events keep every bit, and memory is where it is said to
be.
"""

import gc
import itertools

import pytest
import torch
from offload_cases import Case, Toy, assert_same_bits, open_case, train
from torch import nn

from interlace.kernels.update import AdamW
from interlace.offload import MemoryBudget, OffloadedOptimizer, OffloadOptions
from interlace.offload.cores import CpuPool
from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.measure import measure
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Home

pytestmark = pytest.mark.gpu
PLENTY = MemoryBudget(10**10, 10**10)


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    """Some machine; the numbers do not matter to what is computed."""
    return load_profile("4xh100-pcie5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
def test_no_home_changes_a_bit(overlap: str, dtype: torch.dtype, profile: HardwareProfile) -> None:
    mixes = [(), (Home.HOST,), (Home.STAGED,), tuple(Home)]
    clips = [None] if overlap == "backward" else [None, 1.0]
    for clip, accumulation, split in itertools.product(clips, [1, 3], [False, True]):
        same = {
            "dtype": dtype,
            "clip": clip,
            "accumulation": accumulation,
            "split_master": split,
            "device": "cuda",
        }
        resident = train(Case(strategy="none", **same), profile)
        for homes in mixes:
            case = Case(homes=homes, overlap=overlap, subgroup_elements=200, **same)
            assert_same_bits(train(case, profile), resident, case)


def test_the_first_gigabytes_of_a_real_update_keep_every_bit(profile: HardwareProfile) -> None:
    """Copies and updates that last long enough for a missing event to show."""
    results = []
    for homes in ([Home.RESIDENT], [Home.HOST], [Home.STAGED], [Home.STAGED, Home.HOST]):
        model = Toy(torch.bfloat16, ((20_000_000,),) * 6).to("cuda")
        optimizer = OffloadedOptimizer(
            model.parameters(),
            AdamW(lr=0.01, weight_decay=0.1),
            strategy="none",
            budget=PLENTY,
            overlap="forward",
            clip_norm=1.0,
            model=model,
            options=OffloadOptions(subgroup_elements=1),
        )
        optimizer.rehome([homes[n % len(homes)] for n in range(len(optimizer.subgroups))])
        for step in range(4):
            model(0.1 * step).backward()
            optimizer.step()
        optimizer.synchronize()
        results.append([optimizer.master(p).cpu().clone() for p in model.parameters()])
        optimizer.close()
        del model, optimizer
        gc.collect()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_slabs_are_pinned_as_long_as_they_live() -> None:
    pool = CpuPool(2)
    slabs = HostSlabs(pool, pin=True)
    for _ in range(20):
        # Memory that is given back comes again at the same address; it must not still be pinned.
        slab = slabs.empty(5_000_001, torch.bfloat16)
        assert slab.is_pinned()
        assert slab[1000:].is_pinned()
    pool.close()


def test_state_on_the_host_takes_no_device_memory(profile: HardwareProfile) -> None:
    torch.cuda.empty_cache()
    model = nn.ParameterList(
        nn.Parameter(torch.zeros(10_000_000, dtype=torch.bfloat16, device="cuda")) for _ in range(4)
    )
    before = torch.cuda.memory_allocated()
    optimizer = OffloadedOptimizer(model.parameters(), strategy="host", budget=PLENTY)
    assert torch.cuda.memory_allocated() - before < 2**20
    torch.cuda.reset_peak_memory_stats()
    sum(p.float().sum() for p in model).backward()
    optimizer.step()
    assert all(p.grad is None for p in model)
    optimizer.close()


def test_a_report_puts_host_and_device_on_one_time_line(profile: HardwareProfile) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, overlap="forward", device="cuda")
    model, optimizer = open_case(case, profile)
    for step in range(3):
        model(0.1 * step).backward()
        optimizer.step()
    report = optimizer.finish_report()
    assert report is not None
    spans = {(e.subgroup, e.lane, e.what): (e.start, e.stop) for e in report.timeline.events}
    for subgroup in optimizer.subgroups:
        if subgroup.home is Home.HOST:
            # A millisecond for what two clocks differ.
            updated = spans[subgroup.index, "cpu", "update"][1]
            assert updated <= spans[subgroup.index, "h2d", "weights"][0] + 1e-3
    assert 0 < report.update_seconds < 10
    optimizer.close()


def test_a_machine_with_a_gpu_is_measured(profile: HardwareProfile) -> None:
    found = measure(torch.device("cuda"), lambda _: None, trials=2)
    assert found.rates is not None
    assert found.rates.h2d_bytes_per_second > 1e9
    assert found.rates.device_update_bytes_per_second > found.rates.h2d_bytes_per_second
