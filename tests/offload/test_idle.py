"""Checksums of idle state: every flipped bit is found where it is, and use is not taken for it."""

import random

import pytest
import torch
from torch import nn

from interlace.kernels.update import AdamW
from interlace.offload import idle
from interlace.offload.hardware import HardwareProfile
from interlace.offload.idle import Change, changed, checksums
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget

CHUNK = 64
"""Bytes of a chunk in these tests: slabs have several, the last one shorter."""


@pytest.fixture
def optimizer(profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> OffloadedOptimizer:
    """Three subgroups, after one update: on the host, staged, and on the device."""
    monkeypatch.setattr(idle, "CHUNK_BYTES", CHUNK)
    parameters = [nn.Parameter(torch.ones(50, dtype=torch.bfloat16)) for _ in range(3)]
    made = OffloadedOptimizer(
        parameters,
        AdamW(),
        strategy="host",
        budget=MemoryBudget(10**9, 10**9),
        profile=profile,
        options=OffloadOptions(subgroup_elements=50, moment_dtype=torch.bfloat16),
    )
    made.rehome([Home.HOST, Home.STAGED, Home.RESIDENT])
    update(made)
    return made


def update(optimizer: OffloadedOptimizer) -> None:
    """Take a step with gradients of one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.synchronize()


def test_state_that_lies_still_has_not_changed(optimizer: OffloadedOptimizer) -> None:
    taken = checksums(optimizer.subgroups)
    # 200 bytes of a master are 4 chunks, 100 of each moment 2; of two subgroups.
    assert len(taken) == 2 * (4 + 2 + 2)
    assert {each.subgroup for each in taken} == {0, 1}
    assert changed(taken) == []


def test_every_flipped_bit_is_found_in_its_chunk(optimizer: OffloadedOptimizer) -> None:
    draw = random.Random(0)
    taken = checksums(optimizer.subgroups)
    for _ in range(200):
        number = draw.randrange(2)
        name = draw.choice(["master", "exp_avg", "exp_avg_sq"])
        slab = optimizer.subgroups[number].slabs[name]
        octets, size = slab.view(torch.uint8), slab.element_size()
        place, bit = draw.randrange(len(octets)), 1 << draw.randrange(8)
        octets[place] ^= bit
        start = place // CHUNK * CHUNK
        stop = min(start + CHUNK, len(octets))
        elements = (start // size, (stop - 1) // size)
        assert changed(taken) == [Change(number, name, start, stop, *elements)]
        octets[place] ^= bit
    assert changed(taken) == []


def test_an_update_changes_what_it_should(optimizer: OffloadedOptimizer) -> None:
    taken = checksums(optimizer.subgroups)
    update(optimizer)
    assert {(each.subgroup, each.slab) for each in changed(taken)} == {
        (number, name) for number in (0, 1) for name in ("master", "exp_avg", "exp_avg_sq")
    }


def test_state_that_moves_to_other_memory_is_passed_over(optimizer: OffloadedOptimizer) -> None:
    taken = checksums(optimizer.subgroups)
    optimizer.rehome([Home.RESIDENT, Home.RESIDENT, Home.RESIDENT])
    update(optimizer)
    assert changed(taken) == []
