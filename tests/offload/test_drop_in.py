"""In loops that others wrote: what people do between steps must count, or be refused with words."""

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from offload_cases import Case, Toy, groups_of, open_case
from torch import nn

from interlace.kernels.update import SGD, AdamW
from interlace.offload import MemoryBudget, MemoryShortage, OffloadedOptimizer, OffloadOptions
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import LaneError, Throttle
from interlace.offload.schedule import Home
from interlace.offload.subgroup import SubgroupState

RULE = AdamW(lr=0.01, weight_decay=0.1)
SLOW = Throttle(cpu_bytes_per_second=3e5)
"""An update that lasts for a while, so that who does not wait sees old weights."""


def host(
    model: nn.Module,
    *,
    overlap: str = "none",
    waits: bool = True,
    options: OffloadOptions | None = None,
    clip_norm: float | None = None,
) -> OffloadedOptimizer:
    """Return an AdamW that keeps all state on the host, in a subgroup per parameter."""
    return OffloadedOptimizer(
        model.parameters(),
        RULE,
        strategy="host",
        budget=MemoryBudget(10**9, 10**9),
        overlap=overlap,
        clip_norm=clip_norm,
        model=model if waits and overlap != "none" else None,
        options=options or OffloadOptions(subgroup_elements=1),
    )


def torchs(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def pair() -> tuple[Toy, Toy]:
    return Toy(torch.float32), Toy(torch.float32)


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ---- what parameters may come as ---------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model.parameters(),
        lambda model: [{"params": model.parameters()}],
        lambda model: [{"params": (p for p in model.parameters())}],
        lambda model: model.named_parameters(),
        lambda model: [{"params": model.named_parameters()}],
        lambda model: [{"params": p} for p in model.parameters()],
        lambda model: [{"params": []}, {"params": list(model.parameters())}],
    ],
)
def test_every_form_that_torch_takes_trains_every_parameter(given: object) -> None:
    model, twin = pair()
    optimizer = OffloadedOptimizer(given(model), RULE, strategy="host")
    plain = torchs(twin)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            net(0.1 * step).backward()
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_a_parameter_listed_twice_is_updated_once() -> None:
    model, twin = pair()
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = OffloadedOptimizer([*parameters, parameters[0]], RULE, strategy="host")
    plain = torchs(twin)
    for net, updater in ((model, optimizer), (twin, plain)):
        net(0.1).backward()
        updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_wrong_kinds_of_arguments_are_named() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"give an iterable of parameters .* \[parameter\]"):
        OffloadedOptimizer(weight, strategy="host")
    with pytest.raises(TypeError, match=r"rule='adamw': give an update rule as an object"):
        OffloadedOptimizer([weight], "adamw", strategy="host")
    with pytest.raises(TypeError, match=r"budget=1000: give MemoryBudget\(device_bytes"):
        OffloadedOptimizer([weight], strategy="host", budget=1000)
    with pytest.raises(ValueError, match=r"cpu_cores=\[99999\]: this process may run on"):
        OffloadOptions(cpu_cores=[99999])
    with pytest.raises(ValueError, match=r"lr=-1: must be 0 or more"):
        AdamW(lr=-1)
    with pytest.raises(ValueError, match="each must be at least 0 and less than 1"):
        AdamW(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="nesterov=True: needs a momentum"):
        SGD(momentum=0.0, nesterov=True)


def test_a_profile_without_rates_is_refused_where_rates_decide(profile: HardwareProfile) -> None:
    with pytest.raises(ValueError, match="has no copy and update rates; measure them with"):
        OffloadedOptimizer(
            Toy(torch.float32).parameters(), profile=profile.model_copy(update={"rates": None})
        )


def test_defaults_of_torch_do_not_reach_the_engine() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Linear(4, 4)
        optimizer = host(model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].dtype is torch.float32
        optimizer.close()
    finally:
        torch.set_default_dtype(before)


def test_frozen_parameters_cost_nothing_until_they_are_trained() -> None:
    model, twin = pair()
    for net in (model, twin):
        for part in list(net.parts)[:5]:
            part.requires_grad_(False)
    optimizer, plain = host(model, overlap="backward"), torchs(twin)
    assert len(optimizer.state) == 3
    for step in range(4):
        if step == 2:
            for net in (model, twin):
                net.parts[0].requires_grad_(True)
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            net(0.1 * step).backward()
            if updater is optimizer and step < 2:
                assert optimizer.update_begun
            updater.step()
    optimizer.synchronize()
    assert_close(model, twin)
    assert len(optimizer.state) == 4
    saved = optimizer.state_dict()
    optimizer.close()
    fresh = Toy(torch.float32)
    fresh.load_state_dict(twin.state_dict())
    for part in list(fresh.parts)[:5]:
        part.requires_grad_(False)
    again = host(fresh)
    again.load_state_dict(saved)
    # What is frozen here but was trained there keeps its state.
    assert len(again.state) == 4
    assert torch.equal(again.state[fresh.parts[0].weight]["exp_avg"], saved["state"][0]["exp_avg"])
    again.close()


# ---- gradients that come late, twice, or not at all --------------------------------------------


def test_a_gradient_after_its_update_has_begun_is_refused() -> None:
    model = Toy(torch.float32)
    optimizer = host(model, overlap="backward")
    model(0.1).backward()
    with pytest.raises(RuntimeError, match=r"came after its update had begun.*accumulation_steps"):
        model(0.2).backward()
    with pytest.raises(LaneError, match="continue from a checkpoint"):
        optimizer.step()
    optimizer.close()


def test_gradients_that_were_used_cannot_be_dropped() -> None:
    model = Toy(torch.float32)
    optimizer = host(model, overlap="backward")
    model(0.1).backward()
    with pytest.raises(RuntimeError, match=r"8 of 8 subgroups cannot be dropped.*call step\(\)"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.close()


def test_a_scale_that_comes_too_late_is_refused() -> None:
    model = Toy(torch.float32)
    optimizer = host(model, overlap="backward")
    (model(0.1) * 1024).backward()
    with pytest.raises(ValueError, match=r"gradient_scale=0.00\d+: overlap='backward' has used"):
        optimizer.step(gradient_scale=1 / 1024)
    optimizer.close()


def test_an_interrupted_step_can_be_finished() -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    original, calls = optimizer._executor.launch, []

    def interrupt(work: object) -> None:
        calls.append(work)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(work)

    optimizer._executor.launch = interrupt
    model(0.1).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer._executor.launch = original
    optimizer.step()
    # The one that was interrupted is left out, and none is updated twice.
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 1, 0, 1, 1, 1, 1]
    saved = copy.deepcopy(optimizer.state_dict())
    calls.clear()
    optimizer._executor.launch = interrupt
    model(0.1).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\) was interrupted; continue from a checkpoint"):
        model(0.1).backward()
    with pytest.raises(LaneError, match="was interrupted"):
        optimizer.step()
    optimizer._executor.launch = original
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    model(0.1).backward()
    optimizer.step()
    optimizer.close()


@pytest.mark.parametrize("stream", [True, False])
def test_accumulation_that_nobody_announced_is_exact(stream: bool) -> None:
    model, twin = pair()
    optimizer, plain = host(model, options=OffloadOptions(stream_gradients=stream)), torchs(twin)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            for micro in range(3):
                net(0.1 * step - micro).backward()
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_a_long_gradient_is_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlace.offload.gradients.LANDING_BYTES", 64)
    model, twin = pair()
    options = OffloadOptions(accumulation_steps=3)
    optimizer, plain = host(model, options=options, clip_norm=1.0), torchs(twin)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            for micro in range(3):
                net(0.1 * step - micro).backward()
            if updater is plain:
                nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_dropped_gradients_do_not_come_back() -> None:
    model, twin = pair()
    options = OffloadOptions(accumulation_steps=2)
    optimizer, plain = host(model, options=options), torchs(twin)
    for step in range(6):
        for net, updater in ((model, optimizer), (twin, plain)):
            for micro in range(2):
                net(0.1 * step - micro).backward()
            if step % 2 == 0:
                updater.step()
            updater.zero_grad()
    assert_close(model, twin)
    optimizer.close()


def test_loops_that_look_at_gradients_keep_them_until_step() -> None:
    model, twin = pair()
    optimizer, plain = host(model, options=OffloadOptions(stream_gradients=False)), torchs(twin)
    for step in range(4):
        for net, updater in ((model, optimizer), (twin, plain)):
            net.zero_grad()
            net(9.0).backward()
            net.zero_grad()
            net(0.1 * step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = host(model)
    with pytest.raises(TypeError, match=r"only dense gradients .* sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
    optimizer.close()


# ---- others who write or read weights ----------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "host", "stride"])
def test_weights_written_between_backward_and_step_count(
    strategy: str, profile: HardwareProfile
) -> None:
    model, optimizer = open_case(Case(strategy=strategy, subgroup_elements=100, stride=2), profile)
    twin = Toy(torch.float32)
    plain = torchs(twin)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            net(0.1 * step).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p.clamp_(-0.3, 0.3)
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_sharpness_aware_steps_keep_the_master() -> None:
    """Weights are moved, a second backward runs there, and they are moved back."""
    results = []
    for strategy in ("none", "host", "stride"):
        model = Toy(torch.bfloat16)
        optimizer = OffloadedOptimizer(
            model.parameters(),
            AdamW(lr=1e-4),
            strategy=strategy,
            options=OffloadOptions(subgroup_elements=100, stride=2),
        )
        for step in range(3):
            model(0.1 * step).backward()
            kept = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05)
            optimizer.zero_grad()
            model(0.1 * step).backward()
            with torch.no_grad():
                for p, old in zip(model.parameters(), kept, strict=True):
                    p.copy_(old)
            optimizer.step()
        results.append([optimizer.master(p).clone() for p in model.parameters()])
        optimizer.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # bfloat16 alone cannot hold steps this small.
    rounded = [m.bfloat16().float() for m in results[0]]
    assert any(not torch.equal(m, r) for m, r in zip(results[0], rounded, strict=True))


@pytest.mark.parametrize("overlap", ["forward", "backward"])
def test_saving_loading_and_calling_a_part_wait_for_the_update(overlap: str) -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    wrapped = nn.ModuleDict({"body": model, "head": nn.Linear(200, 1)})
    wrapped.forward = lambda x: wrapped["head"](wrapped["body"](x))
    inputs = torch.randn(4, 200)
    for look in ("state_dict", "head", "load_state_dict", "synchronize"):
        twin = copy.deepcopy({"body": model, "head": wrapped["head"]})
        optimizer = host(wrapped, overlap=overlap, options=OffloadOptions(throttle=SLOW))
        plain = torch.optim.AdamW(
            [*twin["body"].parameters(), *twin["head"].parameters()], lr=0.01, weight_decay=0.1
        )
        wrapped(inputs).sum().backward()
        twin["head"](twin["body"](inputs)).sum().backward()
        optimizer.step()
        plain.step()
        match look:
            case "state_dict":
                saved = {k: v.clone() for k, v in wrapped.state_dict().items()}
                torch.testing.assert_close(saved["head.weight"], twin["head"].weight.detach())
                torch.testing.assert_close(saved["body.1.weight"], twin["body"][1].weight.detach())
            case "head":
                torch.testing.assert_close(wrapped["head"](inputs), twin["head"](inputs))
            case "load_state_dict":
                zeros = {k: torch.zeros_like(v) for k, v in wrapped.state_dict().items()}
                wrapped.load_state_dict(zeros)
                optimizer.synchronize()
                assert not any(bool(p.any()) for p in wrapped.parameters())
            case _:
                optimizer.synchronize()
                torch.testing.assert_close(model[1].weight, twin["body"][1].weight)
        optimizer.close()
        for p in wrapped.parameters():
            nn.init.normal_(p, std=0.05)


def test_layers_of_a_bare_sequence_are_waited_for_one_by_one() -> None:
    from interlace.offload.forward import units

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    assert [part for part, _ in units(model)] == list(model)


def test_without_a_model_step_waits_for_an_update_begun_in_backward() -> None:
    model, twin = nn.Linear(300, 300), nn.Linear(300, 300)
    twin.load_state_dict(model.state_dict())
    optimizer = host(model, overlap="backward", waits=False, options=OffloadOptions(throttle=SLOW))
    plain = torchs(twin)
    for net, updater in ((model, optimizer), (twin, plain)):
        net(torch.ones(2, 300)).sum().backward()
        updater.step()
    torch.testing.assert_close(model.weight, twin.weight)
    optimizer.close()


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
def test_rates_in_tensors_are_read_at_the_step(overlap: str) -> None:
    model, twin = pair()
    optimizer = host(
        model,
        overlap=overlap,
        options=OffloadOptions(throttle=SLOW, subgroup_elements=1),
    )
    plain = torchs(twin)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            rate = 0.01 / (1 + step)
            if updater is optimizer:
                optimizer.param_groups[0]["lr"].fill_(rate)
            else:
                plain.param_groups[0]["lr"] = rate
            net(0.1 * step).backward()
            updater.step()
            if updater is optimizer:
                optimizer.param_groups[0]["lr"].fill_(100.0)
            updater.zero_grad()
    optimizer.synchronize()
    assert_close(model, twin)
    optimizer.close()


def test_a_compiled_model_waits_too() -> None:
    torch._dynamo.reset()
    model, twin = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    options = OffloadOptions(throttle=SLOW, subgroup_elements=1)
    optimizer = host(model, overlap="forward", options=options)
    compiled = torch.compile(model, backend="eager")
    plain = torchs(twin)
    for _ in range(3):
        for net, updater in ((compiled, optimizer), (twin, plain)):
            updater.zero_grad()
            net(torch.ones(2, 64)).square().sum().backward()
            updater.step()
    optimizer.synchronize()
    assert_close(model, twin)
    optimizer.close()


# ---- owners, threads, ends ---------------------------------------------------------------------


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
    before = lane_threads()
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
        del optimizer, model
        gc.collect()
        assert slab() is None
    deadline = threading.Event()
    for _ in range(100):
        if lane_threads() <= before:
            break
        deadline.wait(0.05)
    assert lane_threads() <= before


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


# ---- memory ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("strategy", ["none", "stride", "host", "optimal"])
def test_a_shortage_that_nothing_can_mend_does_not_stop_the_run(
    strategy: str, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = open_case(Case(strategy=strategy, subgroup_elements=200, stride=2), profile)
    monkeypatch.setattr("interlace.offload.monitor.allocation_retries", lambda _: 1)
    monkeypatch.setattr("interlace.offload.optimizer.available_device_bytes", lambda _: 10**9)
    for step in range(3):
        model(0.1 * step).backward()
        optimizer.step()
    assert int(optimizer.state[model.parts[0].weight]["step"]) == 3
    optimizer.close()


# ---- several ranks -----------------------------------------------------------------------------

SHARDED = """
import copy, json, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from interlace.offload import AdamW, OffloadedOptimizer, OffloadOptions
from interlace.offload.lanes import Throttle
dist.init_process_group("gloo")
rank = dist.get_rank()
slow = Throttle(cpu_bytes_per_second=2e6)
worst = {}

def build():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(33, 33) for _ in range(4)), nn.Linear(33, 1))

def layout(model, kind):
    if kind == "grouped":
        fully_shard(model[0]); fully_shard(model[1])
        fully_shard([model[2], model[3], model[4]])
    elif kind != "root":
        for part in model:
            fully_shard(part)
    fully_shard(model)
    if kind == "prefetch":
        model[0].set_modules_to_forward_prefetch([model[1], model[2]])
        model[1].set_modules_to_forward_prefetch([model[3], model[4]])
    return model

def run(kind, offloaded, write=False):
    model = layout(build(), kind)
    if offloaded:
        optimizer = OffloadedOptimizer(
            model.parameters(), AdamW(lr=0.01, weight_decay=0.1), strategy="host",
            overlap="forward", clip_norm=1.0, model=model,
            options=OffloadOptions(subgroup_elements=100, throttle=slow, recalibrate=False))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)
    for step in range(4):
        if write and step == 2:
            if offloaded:
                optimizer.synchronize()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
        optimizer.zero_grad()
        model(torch.randn(8, 33, generator=generator)).square().mean().backward()
        if not offloaded:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    result = [v.full_tensor() for v in model.state_dict().values()]
    if offloaded:
        optimizer.close()
    return result

for kind in ("plain", "root", "grouped", "prefetch", "written"):
    write = kind == "written"
    pairs = zip(run(kind, True, write), run(kind, False, write), strict=True)
    worst[kind] = max(float((a - b).abs().max()) for a, b in pairs)
if rank == 0:
    print("WORST", json.dumps(worst))
"""


def test_every_way_to_shard_a_model_waits_for_the_right_weights(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("WORST")]
    assert found, done.stdout + done.stderr
    worst = json.loads(found[0].removeprefix("WORST"))
    assert set(worst) == {"plain", "root", "grouped", "prefetch", "written"}
    assert all(value < 1e-6 for value in worst.values()), worst


def test_groups_and_shards_round_with_noise_of_their_own() -> None:
    model = Toy(torch.bfloat16, ((4000,), (4000,)))
    with torch.no_grad():
        model.parts[1].weight.copy_(model.parts[0].weight)
    optimizer = OffloadedOptimizer(
        groups_of(model, 2),
        AdamW(lr=0.01),
        strategy="host",
        options=OffloadOptions(moment_dtype=torch.bfloat16),
    )
    model(0.1).backward()
    optimizer.step()
    one, other = (optimizer.state[part.weight]["exp_avg"] for part in model.parts)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.float(), other.float(), rtol=0.01, atol=1e-6)
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
