"""State that another program lends: flat partitions as DeepSpeed has them, without DeepSpeed."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interlace.kernels.update import AdamW
from interlace.offload.deepspeed.attachment import Attachment
from interlace.offload.deepspeed.flats import Lent
from interlace.offload.executor import cast_into
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import LaneError
from interlace.offload.memory import HostSlabs
from interlace.offload.options import OffloadOptions
from interlace.offload.performance_model import lower_bound, predict_homes, solve
from interlace.offload.schedule import Footprint, Home, MemoryBudget, MemoryShortage, Subgroup
from interlace.offload.simulator import simulate

SIZES = (700, 130, 64)
PLENTY = MemoryBudget(10**12, 10**12)
OWN = Footprint(weight=2, gradient=4, state=12)
LENT = replace(OWN, gradient_with_state=True)


class Lender:
    """A program with flat partitions: two of one parameter group, one of another."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.flats = [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]
        self.weights = [flat.detach().to(dtype) for flat in self.flats]
        groups = [
            {"params": self.flats[:2], "lr": 0.01},
            {"params": self.flats[2:], "lr": 0.02, "weight_decay": 0.1},
        ]
        self.zero: Any = SimpleNamespace(optimizer=torch.optim.AdamW(groups))
        self.linked = 0

    def lent(self) -> list[Lent]:
        pairs = zip(self.flats, self.weights, strict=True)
        return [Lent(*pair, group=n // 2) for n, pair in enumerate(pairs)]

    def relink(self) -> None:
        self.linked += 1

    def bind(self, attachment: Attachment) -> None: ...

    def unbind(self) -> None: ...

    def make_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1 + step)
        for flat in self.flats:
            if flat.grad is None:
                flat.grad = torch.zeros_like(flat)
            flat.grad.copy_(torch.randn(flat.shape, generator=generator))


def attachment_of(lender: Lender, elements: int = 10**9, **named: Any) -> Attachment:
    options = OffloadOptions(subgroup_elements=elements, cpu_threads=2)
    usual = {"strategy": "host", "budget": PLENTY, "profile": None, "options": options}
    lender.make_gradients(0)
    return Attachment(lender, AdamW(), **usual | named)


def update(attachment: Attachment, scale: float = 1.0) -> None:
    attachment.begin()
    for flat in attachment.flats:
        attachment.launch(flat, scale, [])
    attachment.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("homes", [[Home.HOST], [Home.STAGED], [Home.HOST, Home.STAGED]])
def test_updates_are_those_of_torch_wherever_they_are_made(
    dtype: torch.dtype, homes: list[Home]
) -> None:
    plain, lender = Lender(dtype), Lender(dtype)
    attachment = attachment_of(lender, elements=128)
    count = len(attachment.homes)
    attachment.rehome([homes[n % len(homes)] for n in range(count)])
    for step in range(4):
        for each in (plain, lender):
            each.make_gradients(step)
        for flat in plain.flats:
            flat.grad.mul_(0.5)
        plain.zero.optimizer.step()
        update(attachment, 0.5)
    for ours, torchs, weight in zip(lender.flats, plain.flats, lender.weights, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight, ours.detach().to(dtype))
        state = lender.zero.optimizer.state[ours]
        assert float(state["step"]) == 4.0
        expected = plain.zero.optimizer.state[torchs]
        torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=1e-6, atol=1e-7)
    attachment.close()


def test_moving_changes_nothing_and_keeps_the_tensor_objects() -> None:
    lender = Lender()
    attachment = attachment_of(lender)
    update(attachment)
    flats = list(lender.flats)
    before = [flat.detach().clone() for flat in flats]
    moments = [lender.zero.optimizer.state[flat]["exp_avg_sq"].clone() for flat in flats]
    for home in (Home.RESIDENT, Home.STAGED, Home.RESIDENT, Home.HOST):
        attachment.rehome([home] * len(SIZES))
        assert attachment.homes == (home,) * len(SIZES)
    assert all(a is b for a, b in zip(flats, lender.flats, strict=True))
    for flat, old, moment in zip(flats, before, moments, strict=True):
        assert torch.equal(flat, old)
        assert torch.equal(lender.zero.optimizer.state[flat]["exp_avg_sq"], moment)
    attachment.close()


def test_state_that_was_loaded_is_taken_over_and_shown_in_the_slab() -> None:
    lender = Lender()
    attachment = attachment_of(lender, elements=128)
    update(attachment)
    saved = lender.zero.optimizer.state_dict()
    saved = {
        **saved,
        "state": {n: {k: v.clone() for k, v in s.items()} for n, s in saved["state"].items()},
    }
    update(attachment)
    lender.zero.optimizer.load_state_dict(saved)
    linked = lender.linked
    attachment.begin()
    assert lender.linked == linked + 1
    for number, flat in enumerate(lender.flats):
        shown = lender.zero.optimizer.state[flat]
        assert shown["exp_avg"] is attachment.flats[number].slabs["exp_avg"]
        assert torch.equal(shown["exp_avg"], saved["state"][number]["exp_avg"])
        assert (
            attachment.flats[number].pieces[0].group
            is lender.zero.optimizer.param_groups[number // 2]
        )
    attachment.begin()
    assert lender.linked == linked + 1, "nothing was elsewhere the second time"
    attachment.close()


def test_after_a_failed_update_nothing_builds_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = Lender()
    attachment = attachment_of(lender)

    def fail(*_: object) -> None:
        raise OSError("no such page")

    monkeypatch.setattr("interlace.offload.executor.upload_weights", fail)
    with pytest.raises(LaneError, match="no such page"):
        update(attachment)
    monkeypatch.undo()
    with pytest.raises(LaneError, match="continue from a checkpoint"):
        update(attachment)
    attachment.close()


def test_a_step_that_ends_before_its_update_leaves_nothing_to_build_on() -> None:
    lender = Lender()
    attachment = attachment_of(lender)
    with pytest.raises(KeyboardInterrupt), attachment.one_step():
        attachment.begin()
        raise KeyboardInterrupt
    update(attachment)
    with pytest.raises(KeyboardInterrupt), attachment.one_step():
        attachment.begin()
        attachment.launch(attachment.flats[0], 1.0, [])
        raise KeyboardInterrupt
    with pytest.raises(LaneError, match="continue from a checkpoint"):
        attachment.begin()
    attachment.close()


@pytest.mark.parametrize("slabs", range(0, 12, 3))
def test_memory_that_is_refused_leaves_a_program_as_it_was(
    monkeypatch: pytest.MonkeyPatch, slabs: int
) -> None:
    plain, lender = Lender(), Lender()
    given = iter(range(slabs))
    empty = HostSlabs.empty

    def short(host: HostSlabs, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.float32 and next(given, None) is None:
            raise MemoryShortage("the system refuses to pin")
        return empty(host, elements, dtype)

    monkeypatch.setattr(HostSlabs, "empty", short)
    with pytest.raises(MemoryShortage, match="refuses to pin"):
        attachment_of(lender)
    assert lender.linked == 1
    for each in (plain, lender):
        each.make_gradients(0)
        each.zero.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.flats, lender.flats, strict=True))


@pytest.mark.parametrize("slabs", range(0, 16, 4))
def test_memory_that_is_refused_while_moving_leaves_all_to_go_on_with(
    monkeypatch: pytest.MonkeyPatch, slabs: int
) -> None:
    undisturbed, lender = (Lender(), Lender())
    expected, attachment = attachment_of(undisturbed), attachment_of(lender)
    for each in (expected, attachment):
        each.rehome([Home.RESIDENT] * len(SIZES))
    given, empty, linked = iter(range(slabs)), HostSlabs.empty, lender.linked

    def short(host: HostSlabs, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.float32 and next(given, None) is None:
            raise MemoryShortage("the system refuses to pin")
        return empty(host, elements, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(HostSlabs, "empty", short)
        refused = [Home.STAGED] * len(SIZES)
        if slabs < 4 * len(SIZES):
            with pytest.raises(MemoryShortage, match="refuses to pin"):
                attachment.rehome(refused)
        else:
            attachment.rehome(refused)
    moved = slabs // 4
    assert attachment.homes == (Home.STAGED,) * moved + (Home.RESIDENT,) * (len(SIZES) - moved)
    assert [flat.resident for flat in attachment.flats] == [
        home is Home.RESIDENT for home in attachment.homes
    ]
    # What links to the slabs has followed those that moved.
    assert lender.linked == linked + 1
    for each in (expected, attachment):
        update(each)
        each.close()
    for ours, theirs in zip(lender.flats, undisturbed.flats, strict=True):
        assert torch.equal(ours, theirs)


def test_who_reads_state_beside_training_is_told_before_any_of_it_changes() -> None:
    lender = Lender()
    attachment = attachment_of(lender)
    update(attachment)
    seen: list[torch.Tensor] = []
    for flat in attachment.flats:
        flat.before_change = lambda flat: seen.append(flat.slabs["exp_avg"].clone())
    before = [flat.slabs["exp_avg"].clone() for flat in attachment.flats]
    versions = [flat.version for flat in attachment.flats]
    update(attachment)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
    assert [flat.version for flat in attachment.flats] == [n + 1 for n in versions]
    # Moments that somebody puts in the place of ours are copied into the slab.
    seen.clear()
    mine = attachment.flats[1].slabs["exp_avg"].clone()
    lender.zero.optimizer.state[lender.flats[1]]["exp_avg"] = torch.ones(SIZES[1])
    attachment.begin()
    assert len(seen) == 1 and torch.equal(seen[0], mine)
    assert attachment.flats[1].slabs["exp_avg"].eq(1).all()
    # A gradient is no part of what is saved.
    lender.flats[0].grad = torch.zeros(SIZES[0])
    attachment.begin()
    assert len(seen) == 1
    attachment.close()


def test_schedulers_are_not_told_that_their_optimizer_never_stepped() -> None:
    lender = Lender()
    attachment = attachment_of(lender)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(lender.zero.optimizer, 0.5)
    update(attachment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    attachment.close()


def test_a_group_that_asks_for_another_update_later_is_refused() -> None:
    lender = Lender()
    attachment = attachment_of(lender)
    lender.zero.optimizer.param_groups[1]["maximize"] = True
    with pytest.raises(
        ValueError, match=r"maximize=True, which it had not before: detach\(engine\)"
    ):
        attachment.begin()
    attachment.close()


def test_part_of_a_partition_cannot_be_resident() -> None:
    attachment = attachment_of(Lender(), elements=128)
    wanted = [Home.RESIDENT, *attachment.homes[1:]]
    with pytest.raises(ValueError, match=r"resident as a whole or not at all; its pieces are \[6"):
        attachment.rehome(wanted)
    with pytest.raises(ValueError, match="1 homes for 9 subgroups"):
        attachment.rehome([Home.HOST])
    attachment.close()


@pytest.mark.parametrize("device_bytes", [0, 9_000, 14_000, 20_000, 10**9])
@pytest.mark.parametrize("elements", [128, 10**9])
def test_homes_of_the_performance_model_leave_partitions_whole(
    profile: HardwareProfile, device_bytes: int, elements: int
) -> None:
    budget = MemoryBudget(device_bytes, 10**9)
    options = OffloadOptions(subgroup_elements=elements, cpu_threads=2)
    attachment = attachment_of(
        Lender(), strategy="optimal", budget=budget, profile=profile, options=options
    )
    for flat in attachment.flats:
        resident = {piece.home is Home.RESIDENT for piece in flat.pieces}
        assert len(resident) == 1
    assert attachment.schedule is not None
    assert attachment.schedule.homes == attachment.homes
    held = attachment.placement.held([p.shape for p in attachment.subgroups], attachment.homes)
    assert held.device_bytes <= device_bytes
    attachment.close()


def test_what_casts_to_float16_rounds_as_torch_does() -> None:
    master = torch.randn(10_000) * torch.logspace(-8, 6, 10_000)
    weights = torch.empty(10_000, dtype=torch.float16)
    cast_into(weights, master)
    assert torch.equal(weights, master.half())
    assert weights.isinf().any()


def test_gradients_that_wait_on_the_host_are_copied_in_with_the_state(
    profile: HardwareProfile,
) -> None:
    assert (LENT.copied_in, LENT.staged_copy, OWN.copied_in) == (16, 12, 12)
    schedules = {
        footprint: solve(
            profile, [Subgroup(10**8, footprint)] * 12, PLENTY, strategy="stride", stride=2
        )
        for footprint in (OWN, LENT)
    }
    copied = {
        footprint: sum(e.bytes for e in simulate(schedule, profile).events if e.what == "copy in")
        for footprint, schedule in schedules.items()
    }
    assert copied == {OWN: 6 * 12 * 10**8, LENT: 6 * 16 * 10**8}


@pytest.mark.parametrize("device_gib", [4, 8, 40])
def test_no_schedule_of_lent_state_is_faster_than_its_bound(
    profile: HardwareProfile, device_gib: int
) -> None:
    subgroups = [Subgroup(10**8, LENT)] * 12
    memory = MemoryBudget(device_gib * 2**30, 10**12)
    schedule = solve(profile, subgroups, memory)
    bound = lower_bound(profile, subgroups, memory)
    assert schedule.prediction.update_seconds >= bound * (1 - 1e-6)
    on_host = replace(schedule, homes=(Home.HOST,) * 12)
    slower = predict_homes(profile, on_host, OffloadOptions().hidden_window)
    assert schedule.prediction.update_seconds <= slower.prediction.update_seconds
