"""Owners, threads, memory, and how an optimizer ends."""

import copy
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from offload_cases import (
    SIZES,
    Case,
    Toy,
    assert_close,
    host,
    open_case,
    pair,
    torchs,
)
from torch import nn

from interlace.offload import MemoryBudget, MemoryShortage, OffloadedOptimizer, OffloadOptions
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import LaneError, Throttle
from interlace.offload.schedule import Home
from interlace.offload.subgroup import SubgroupState


def lane_threads() -> int:
    names = ("lane-", "cpu-update")
    return sum(thread.name.startswith(names) for thread in threading.enumerate())


def test_a_second_optimizer_of_the_same_parameters_is_refused_until_the_first_is_gone() -> None:
    model = Toy(torch.float32)
    first = host(model)
    with pytest.raises(ValueError, match=r"another OffloadedOptimizer serves .* call close\(\)"):
        host(model)
    first.close()
    second = host(model)
    gone = weakref.ref(second)
    del second
    third = host(model)
    assert gone() is None
    before = [p.detach().clone() for p in model.parameters()]
    model(0.1).backward()
    third.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    third.close()


def test_nothing_is_left_of_optimizers_that_were_refused_or_dropped() -> None:
    gc.collect()
    before, pause = lane_threads(), threading.Event()
    for _ in range(3):
        with pytest.raises(MemoryShortage):
            OffloadedOptimizer(
                Toy(torch.float32).parameters(), strategy="host", budget=MemoryBudget(0, 1)
            )
        model = Toy(torch.float32)
        optimizer = host(model, overlap="forward")
        model(0.1).backward()
        optimizer.step()
        slab = weakref.ref(optimizer.subgroups[0].slabs["exp_avg"])
        # Nothing is in a cycle: it goes with its last name, also while its model lives.
        gc.disable()
        del optimizer
        for _ in range(200):
            if slab() is None:
                break
            pause.wait(0.02)
        gc.enable()
        assert slab() is None
        assert not model.parts[0]._forward_pre_hooks
    for _ in range(100):
        if lane_threads() <= before:
            break
        pause.wait(0.05)
    assert lane_threads() <= before


def test_a_dropped_optimizer_finishes_what_it_began() -> None:
    model, twin = pair()
    plain = torchs(twin)
    options = OffloadOptions(subgroup_elements=1, throttle=Throttle(cpu_bytes_per_second=2e5))

    def train_once() -> None:
        optimizer = host(model, overlap="forward", options=options)
        model(0.1).backward()
        optimizer.step()

    train_once()
    twin(0.1).backward()
    plain.step()
    # Another one is served as soon as nobody else is, and by then all is written.
    gc.collect()
    pause = threading.Event()
    for _ in range(200):
        if not model.parts[0]._forward_pre_hooks:
            break
        pause.wait(0.02)
    assert_close(model, twin)


def test_a_failed_update_is_not_swallowed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import interlace.offload.executor as executor

    def fail(*_: object, **__: object) -> None:
        raise OSError("the link is down")

    for leave in ("state_dict", "close"):
        model = Toy(torch.float32)
        optimizer = host(model, overlap="forward")
        model(0.1).backward()
        with monkeypatch.context() as patch:
            patch.setattr(executor, "upload_weights", fail)
            optimizer.step()
            with pytest.raises(LaneError, match="the link is down"):
                (model.state_dict if leave == "state_dict" else optimizer.close)()
        optimizer.close()


def test_to_close_twice_takes_nothing_from_the_next_owner() -> None:
    model = Toy(torch.float32)
    first = host(model)
    first.close()
    second = host(model)
    first.close()
    with pytest.raises(ValueError, match="another OffloadedOptimizer serves"):
        host(model)
    second.close()


def test_a_closed_optimizer_says_so_and_never_hangs() -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    optimizer.close()
    model(0.1).backward()
    with pytest.raises(LaneError, match="the optimizer is closed"):
        optimizer.step()
    with pytest.raises(LaneError, match="the optimizer is closed"):
        optimizer.load_state_dict({})
    optimizer.close()


def test_a_failed_update_is_mended_by_loading_a_checkpoint(
    profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interlace.offload.executor as executor

    for overlap in ("none", "forward", "backward"):
        case = Case(homes=tuple(Home), subgroup_elements=200, overlap=overlap)
        model, optimizer = open_case(case, profile)
        twin, plain = open_case(case, profile)
        for net, updater in ((model, optimizer), (twin, plain)):
            net(0.1).backward()
            updater.step()
            updater.zero_grad()
        weights = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())

        def fail(*_: object, **__: object) -> None:
            raise OSError("the link is down")

        monkeypatch.setattr(executor, "copy_all", fail)
        with pytest.raises(LaneError, match="the link is down"):
            model(0.2).backward()
            optimizer.step()
            optimizer.synchronize()
        monkeypatch.undo()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for step in range(3):
            for net, updater in ((model, optimizer), (twin, plain)):
                net(0.1 * step).backward()
                updater.step()
                updater.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(optimizer.master(p), plain.master(q))
            assert torch.equal(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])
        optimizer.close()
        plain.close()


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    for bad in (torch.zeros(3, dtype=torch.float16), torch.zeros(10**9, device="meta")):
        with pytest.raises(ValueError, match="a parameter of shape"):
            optimizer.add_param_group({"params": [nn.Parameter(bad)]})
    big = nn.Parameter(torch.zeros(10**8))
    with pytest.raises(MemoryShortage):
        optimizer.add_param_group({"params": [big]})
    assert len(optimizer.param_groups) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.close()


def test_it_can_be_neither_copied_nor_pickled() -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    with pytest.raises(TypeError, match=r"neither copied nor pickled; save its state_dict\(\)"):
        copy.deepcopy(optimizer)
    optimizer.close()


def test_hooks_of_loading_are_called() -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    seen: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"]
    optimizer.close()


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"amsgrad": True}, "trained with amsgrad=True, which the rule adamw does not know"),
        ({"maximize": True}, "trained with maximize=True"),
    ],
)
def test_state_of_another_update_is_refused(theirs: dict[str, bool], words: str) -> None:
    model = Toy(torch.float32)
    plain = torch.optim.AdamW(model.parameters(), **theirs)
    model(0.1).backward()
    plain.step()
    plain.zero_grad()
    optimizer = host(model)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(plain.state_dict())
    optimizer.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every host slab that is made."""
    from interlace.offload.memory import HostSlabs

    made: list[int] = []
    original = HostSlabs.empty

    def count(self: HostSlabs, elements: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(elements * dtype.itemsize)
        return original(self, elements, dtype)

    monkeypatch.setattr(HostSlabs, "empty", count)
    yield made


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_what_was_budgeted_is_allocated(
    accumulation: int, split: bool, moments: torch.dtype, dtype: torch.dtype, counted: list[int]
) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1000, 3000, 500))
    optimizer = OffloadedOptimizer(
        model.parameters(),
        strategy="host",
        budget=MemoryBudget(0, 10**9),
        options=OffloadOptions(
            accumulation_steps=accumulation,
            split_master=split,
            moment_dtype=moments,
            subgroup_elements=1000,
        ),
    )
    needed = sum(s.shape.elements * s.shape.footprint.host_memory for s in optimizer.subgroups)
    assert sum(counted) == needed
    counted.clear()
    for _ in range(accumulation):
        sum(p.float().square().sum() for p in model).backward()
    optimizer.step()
    # But for the landings of gradients that are added.
    assert sum(counted) <= (4 * 16384 if accumulation > 1 else 0)
    optimizer.close()


def test_groups_added_later_are_weighed_against_what_is_free_beside_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 bytes a parameter: a thousand are in, a thousand more fit into what is left."""
    free = [40_000]
    for name in ("host", "device"):
        monkeypatch.setattr(
            f"interlace.offload.placement.available_{name}_bytes", lambda *_: free[0]
        )
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000))])
    optimizer = OffloadedOptimizer(model.parameters(), strategy="host")
    free[0] -= 16_000
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1000))]})
    free[0] -= 16_000
    with pytest.raises(MemoryShortage):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1000))]})
    optimizer.close()


def test_memory_that_cannot_be_had_leaves_the_optimizer_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from interlace.offload.memory import HostSlabs

    model = Toy(torch.float32)
    optimizer = host(model)
    late = nn.Parameter(torch.zeros(5))

    def refuse(*_: object) -> None:
        raise MemoryShortage("the system refuses to pin")

    with monkeypatch.context() as patch:
        patch.setattr(HostSlabs, "empty", refuse)
        with pytest.raises(MemoryShortage, match="refuses to pin"):
            optimizer.add_param_group({"params": [late]})
        # Who is refused may try something else at once.
        with pytest.raises(MemoryShortage):
            OffloadedOptimizer([late], strategy="host")
    assert len(optimizer.subgroups) == len(SIZES)
    other = OffloadedOptimizer([late], strategy="host")
    other.close()
    optimizer.close()


@pytest.mark.parametrize("strategy", ["none", "stride", "host", "optimal"])
def test_a_shortage_that_nothing_can_mend_does_not_stop_the_run(
    strategy: str, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = open_case(Case(strategy=strategy, subgroup_elements=200, stride=2), profile)
    monkeypatch.setattr("interlace.offload.monitor.allocation_retries", lambda _: 1)
    for step in range(3):
        model(0.1 * step).backward()
        optimizer.step()
    assert int(optimizer.state[model.parts[0].weight]["step"]) == 3
    optimizer.close()


def test_homes_that_are_left_are_given_up_one_by_one(
    profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interlace.offload.memory as memory

    live = [0]

    class Counted(memory.Pages):
        def __del__(self) -> None:
            live[0] -= len(self)

    def pages_for(size: int) -> memory.Pages:
        live[0] += size
        return Counted(-1, size)

    monkeypatch.setattr(memory, "pages_for", pages_for)
    count, elements = 8, 50_000
    model = nn.ParameterList(nn.Parameter(torch.zeros(elements)) for _ in range(count))
    optimizer = OffloadedOptimizer(
        model.parameters(),
        strategy="none",
        budget=MemoryBudget(10**9, 10**9),
        profile=profile,
        options=OffloadOptions(subgroup_elements=1),
    )
    # fp32: 16 bytes a parameter on the host.
    optimizer.rehome([Home.HOST] * count)
    original, seen = SubgroupState.move, []

    def move(self: SubgroupState, home: Home) -> None:
        seen.append(live[0])
        original(self, home)

    monkeypatch.setattr(SubgroupState, "move", move)
    optimizer.rehome([Home.RESIDENT] * count)
    assert seen == [16 * elements * left for left in range(count, 0, -1)]
    assert live[0] == 0
    optimizer.close()
