"""In loops that others wrote: what people hand over, and gradients that come late, twice or not at
all.
"""

import copy

import pytest
import torch
from offload_cases import (
    RULE,
    Toy,
    assert_close,
    host,
    pair,
    torchs,
)
from torch import nn

from interlace.kernels.update import SGD, AdamW
from interlace.offload import OffloadedOptimizer, OffloadOptions
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import LaneError, Throttle


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


@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError])
def test_a_step_that_was_interrupted_is_not_built_upon(what: type[BaseException]) -> None:
    model = Toy(torch.float32)
    optimizer = host(model)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    original, calls = optimizer._executor.launch, []

    def interrupt(work: object) -> None:
        calls.append(work)
        if len(calls) == 4:
            raise what
        original(work)

    optimizer._executor.launch = interrupt
    model(0.1).backward()
    with pytest.raises(what):
        optimizer.step()
    optimizer._executor.launch = original
    for again in (optimizer.step, lambda: model(0.1).backward(), optimizer.state_dict):
        with pytest.raises(LaneError, match=r"interrupted .* half updated: continue"):
            again()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    model(0.1).backward()
    optimizer.step()
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {1}
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


def test_a_buffer_of_gradients_may_be_used_again_after_step() -> None:
    model, twin = pair()
    slow = OffloadOptions(subgroup_elements=1, throttle=Throttle(d2h_bytes_per_second=1e4))
    optimizer, plain = host(model, overlap="forward", options=slow), torchs(twin)
    buffers = [torch.ones_like(p) for p in model.parameters()]
    for net, updater in ((model, optimizer), (twin, plain)):
        for p, buffer in zip(net.parameters(), buffers, strict=True):
            p.grad = buffer.fill_(0.5)
        updater.step()
        for buffer in buffers:
            buffer.fill_(-3.0)
    optimizer.synchronize()
    assert_close(model, twin)
    optimizer.close()


def test_writes_that_leave_no_trace_can_be_told() -> None:
    model, twin = pair()
    optimizer, plain = host(model), torchs(twin)
    for step in range(3):
        for net, updater in ((model, optimizer), (twin, plain)):
            for p in net.parameters():
                p.data.mul_(0.5)
                if updater is optimizer:
                    optimizer.set_master(p, p.float())
            updater.zero_grad()
            net(0.1 * step).backward()
            updater.step()
    assert_close(model, twin)
    optimizer.close()


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = host(model)
    with pytest.raises(TypeError, match=r"only dense gradients .* sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
    optimizer.close()
