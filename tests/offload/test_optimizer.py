"""`OffloadedOptimizer` as a torch optimizer: groups, schedulers, state dicts, mistakes."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from offload_cases import Case, Toy, assert_same_bits, groups_of, open_case, train

import interlace.offload.executor as executor_module
from interlace.kernels.update import SGD
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import LaneError
from interlace.offload.optimizer import NonFiniteGradient, OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget, MemoryShortage

STRATEGIES = ("none", "host", "stride", "optimal")
PLENTY = MemoryBudget(10**9, 10**9)
MIXED = Case(homes=tuple(Home), subgroup_elements=200)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def opened(profile: HardwareProfile) -> Iterator[tuple[Toy, OffloadedOptimizer]]:
    """A toy with subgroups of all three homes."""
    model, optimizer = open_case(MIXED, profile)
    yield model, optimizer
    optimizer.close()


def test_it_is_a_torch_optimizer(opened: tuple[Toy, OffloadedOptimizer]) -> None:
    model, optimizer = opened
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set(optimizer.homes) == set(Home)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert set(optimizer.state) == set(model.parameters())
    first = next(model.parameters())
    assert set(optimizer.state[first]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[first]["exp_avg"].shape == first.shape


def test_a_closure_is_refused(opened: tuple[Toy, OffloadedOptimizer]) -> None:
    with pytest.raises(TypeError, match=r"takes no closure: .* call loss\.backward\(\) first"):
        opened[1].step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overlap": "forward"}, r"give the module as model=\.\.\."),
        ({"overlap": "backward", "clip_norm": 1.0}, "the norm is known only after backward"),
        ({"overlap": "both"}, "must be 'none', 'forward' or 'backward'"),
        ({"clip_norm": 0.0}, "must be more than 0, or None for no clipping"),
        ({"strategy": "best"}, "must be one of none, host, stride, optimal"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    arguments: dict[str, object], words: str, profile: HardwareProfile
) -> None:
    with pytest.raises(ValueError, match=words):
        OffloadedOptimizer(Toy(torch.float32).parameters(), profile=profile, **arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride=0: must be 1 or more"),
        ({"staging_slots": 0}, "staging_slots=0: must be 1 or more"),
        ({"moment_dtype": torch.float16}, "moments are kept in torch.float32 or torch.bfloat16"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OffloadOptions(**options)


def test_parameters_it_cannot_serve_are_refused() -> None:
    half = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"shape \(3,\) has dtype torch.float16"):
        OffloadedOptimizer([half], strategy="host")
    turned = torch.nn.Parameter(torch.zeros(3, 4).t())
    with pytest.raises(ValueError, match="is not contiguous"):
        OffloadedOptimizer([turned], strategy="host")
    with pytest.raises(ValueError, match="empty parameter list"):
        OffloadedOptimizer([], strategy="host")


def test_too_little_memory_is_said_before_anything_is_allocated(profile: HardwareProfile) -> None:
    model = Toy(torch.float32)
    with pytest.raises(MemoryShortage, match=r"set offload\.host_budget_gib higher"):
        OffloadedOptimizer(
            model.parameters(), strategy="host", budget=MemoryBudget(0, 100), profile=profile
        )


@pytest.mark.parametrize("before", STRATEGIES)
@pytest.mark.parametrize("after", STRATEGIES)
def test_a_state_dict_moves_between_strategies(
    before: str, after: str, profile: HardwareProfile
) -> None:
    case = Case(strategy=before, subgroup_elements=100, groups=3, dtype=torch.bfloat16)
    model, first = open_case(case, profile)
    for step in range(3):
        model(0.1 * step).backward()
        first.step()
    saved, values = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    twin, second = open_case(
        Case(strategy=after, subgroup_elements=300, groups=3, dtype=torch.bfloat16), profile
    )
    twin.load_state_dict(values)
    second.load_state_dict(saved)
    for step in range(3, 6):
        for net, optimizer in ((model, first), (twin, second)):
            net(0.1 * step).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.master(p), second.master(q))
        assert torch.equal(first.state[p]["exp_avg"], second.state[q]["exp_avg"])
        assert int(second.state[q]["step"]) == 6
    first.close()
    second.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_takes_over_from_torch_s_adamw_and_gives_back(
    strategy: str, profile: HardwareProfile
) -> None:
    model = Toy(torch.float32)
    plain = torch.optim.AdamW(groups_of(model, 2), weight_decay=0.1)
    for step in range(3):
        plain.zero_grad()
        model(0.1 * step).backward()
        plain.step()
    plain.zero_grad()
    twin, ours = open_case(Case(strategy=strategy, subgroup_elements=100, groups=2), profile)
    twin.load_state_dict(model.state_dict())
    ours.load_state_dict(plain.state_dict())
    twin(0.5).backward()
    ours.step()
    model(0.5).backward()
    plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    plain.load_state_dict(ours.state_dict())
    ours.close()


def test_state_of_another_rule_or_shape_is_refused(
    opened: tuple[Toy, OffloadedOptimizer], profile: HardwareProfile
) -> None:
    model, optimizer = opened
    twin = Toy(torch.float32)
    sgd = torch.optim.SGD(twin.parameters(), momentum=0.9)
    twin(0.0).backward()
    sgd.step()
    before = weights(model)
    with pytest.raises(ValueError, match=r"lacks 'exp_avg' .* comes from another update rule"):
        optimizer.load_state_dict(sgd.state_dict())
    other = torch.optim.AdamW(groups_of(twin, 2))
    with pytest.raises(ValueError, match=r"parameter groups of \[4, 4\] parameters, .* \[8\]"):
        optimizer.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_learning_rates_are_read_at_every_step_of_every_group(
    strategy: str, profile: HardwareProfile
) -> None:
    model, optimizer = open_case(
        Case(strategy=strategy, groups=2, subgroup_elements=100, rule=SGD(momentum=0.0)), profile
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.1, 0.2], total_steps=10, cycle_momentum=False
    )
    for _ in range(5):
        before = weights(model)
        model(0.3).backward()
        rates = [group["lr"] for group in optimizer.param_groups]
        gradients = {p: g.clone() for p, g in optimizer.gradients()}
        optimizer.step()
        scheduler.step()
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                index = next(n for n, q in enumerate(model.parameters()) if q is p)
                expected = before[index] - rates[number] * gradients[p]
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)
    optimizer.close()


def test_a_group_added_on_the_way_trains_too(opened: tuple[Toy, OffloadedOptimizer]) -> None:
    model, optimizer = opened
    model(0.1).backward()
    optimizer.step()
    late = torch.nn.Parameter(torch.ones(17))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    ((late**2).sum() + model(0.1)).backward()
    optimizer.step()
    assert bool((late < 1).all())
    assert int(optimizer.state[late]["step"]) == 1
    assert int(optimizer.state[next(model.parameters())]["step"]) == 2


def test_parameters_without_a_gradient_are_left_alone(profile: HardwareProfile) -> None:
    """As torch's optimizers do: no decay, no step."""
    for homes in ((Home.HOST,), (Home.STAGED,), (Home.RESIDENT,)):
        model, optimizer = open_case(Case(homes=homes), profile)
        twin = Toy(torch.float32)
        plain = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
        for used in ([0, 2, 3, 7], [1, 2, 3], list(range(8))):
            for net, updater in ((model, optimizer), (twin, plain)):
                updater.zero_grad()
                torch.stack([net.parts[n](0.2) for n in used]).sum().backward()
                updater.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert int(optimizer.state[p]["step"]) == int(plain.state[q]["step"])
        optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_weights_that_somebody_else_writes_are_taken_over(
    dtype: torch.dtype, split: bool, profile: HardwareProfile
) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, dtype=dtype, split_master=split)
    model, optimizer = open_case(case, profile)
    model(0.1).backward()
    optimizer.step()
    kept = {p: optimizer.master(p).clone() for p in model.parameters()}
    changed = [p for number, p in enumerate(model.parameters()) if number % 2]
    with torch.no_grad():
        for p in changed:
            p.fill_(0.75)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(0.1).backward()
    optimizer.step()
    for p in model.parameters():
        if not any(p is q for q in changed):
            assert torch.equal(optimizer.master(p), kept[p])
        elif split and dtype is torch.bfloat16:
            # The high plane is new; the remainder is less than half a bfloat16 step.
            assert float((optimizer.master(p) - 0.75).abs().max()) <= 0.75 * 2**-8
        else:
            assert torch.equal(optimizer.master(p), torch.full_like(kept[p], 0.75))
    optimizer.close()


@pytest.mark.parametrize("overlap", ["none", "forward"])
def test_a_gradient_that_is_not_finite_stops_the_step_with_nothing_updated(
    overlap: str, profile: HardwareProfile
) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, overlap=overlap, clip=1.0)
    model, optimizer = open_case(case, profile)
    name = "parameter 4" if overlap == "none" else "parts.4.weight"
    before = weights(model)
    (model(0.1) + model.parts[4].weight[3] * torch.inf).backward()
    assert not torch.isfinite(torch.tensor(optimizer.gradient_norm()))
    with pytest.raises(NonFiniteGradient, match=rf"gradient of {name} is .* nothing was updated"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    optimizer.zero_grad()
    model(0.1).backward()
    optimizer.step()
    assert int(optimizer.state[next(model.parameters())]["step"]) == 1
    optimizer.close()


def test_during_backward_a_bad_gradient_stops_the_run_cleanly(profile: HardwareProfile) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, overlap="backward")
    model, optimizer = open_case(case, profile)
    (model(0.1) + model.parts[4].weight[3] * torch.nan).backward()
    assert optimizer.update_begun
    with pytest.raises(NonFiniteGradient, match=r"had updated \d of \d subgroups; continue from"):
        optimizer.step()
    with pytest.raises(LaneError, match="continue from the last checkpoint"):
        model(0.1).backward()


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("broken", ["upload_weights", "copy_all", "update_members", "update"])
def test_a_copy_or_update_that_fails_is_raised_and_never_hangs(
    broken: str, overlap: str, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, overlap=overlap)
    model, optimizer = open_case(case, profile)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the link is down")

    monkeypatch.setattr(executor_module, broken, fail)
    with pytest.raises(LaneError, match=r"the link is down.*half updated: continue from"):
        model(0.1).backward()
        optimizer.step()
        model(0.1)
        optimizer.synchronize()
    monkeypatch.undo()
    with pytest.raises(LaneError, match="half updated"):
        model(0.1).backward()
        optimizer.step()


def test_the_next_forward_waits_for_each_layer_s_own_weights(
    profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(homes=(Home.HOST,), subgroup_elements=1, overlap="forward")
    model, optimizer = open_case(case, profile)
    original, gate = executor_module.Executor.update_on_host, threading.Event()

    def hold_back(self: executor_module.Executor, work: executor_module.Work) -> None:
        if work.subgroup.index == 4:
            gate.wait(120)
        original(self, work)

    monkeypatch.setattr(executor_module.Executor, "update_on_host", hold_back)
    before = weights(model)
    model(0.1).backward()
    # With every gradient there, updates go in forward order.
    assert len(list(optimizer.gradients())) == len(before)
    optimizer.step()
    reached: list[int] = []
    for number, part in enumerate(model.parts):
        part.register_forward_hook(lambda *_, number=number: reached.append(number))
    forward = threading.Thread(target=lambda: model(0.1))
    forward.start()
    deadline = time.monotonic() + 60
    while len(reached) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Layers 0 to 3 went ahead while the update of layer 4 was held back; layer 4 waits for it.
    forward.join(0.3)
    assert reached == [0, 1, 2, 3]
    assert torch.equal(model.parts[4].weight.detach(), before[4])
    gate.set()
    forward.join(60)
    assert reached == list(range(8))
    optimizer.close()


def test_updates_begin_during_backward(profile: HardwareProfile) -> None:
    case = Case(homes=(Home.HOST,), subgroup_elements=1, overlap="backward")
    model, optimizer = open_case(case, profile)
    updated: list[int] = []
    # Backward reaches this hook after the later layers' gradients were complete.
    model.parts[0].weight.register_hook(
        lambda _: updated.extend(int(s.members[0].step) for s in optimizer.subgroups)
    )
    model(0.1).backward()
    assert updated[-1] == 1
    assert updated[0] == 0
    optimizer.step()
    optimizer.close()


def test_without_streaming_gradients_stay_where_torch_puts_them(profile: HardwareProfile) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, stream=False)
    model, optimizer = open_case(case, profile)
    model(0.1).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    optimizer.close()


def test_gradient_scale_undoes_a_loss_scale(profile: HardwareProfile) -> None:
    case = Case(homes=tuple(Home), subgroup_elements=200, clip=1.0)
    plain, scaled = open_case(case, profile), open_case(case, profile)
    for step in range(3):
        plain[0](0.1 * step).backward()
        plain[1].step()
        (scaled[0](0.1 * step) * 1024.0).backward()
        scaled[1].step(gradient_scale=1 / 1024)
    for p, q in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_report_holds_every_copy_and_update_with_its_bytes(
    opened: tuple[Toy, OffloadedOptimizer],
) -> None:
    model, optimizer = opened
    model(0.1).backward()
    optimizer.step()
    report = optimizer.finish_report()
    assert report is not None
    kinds: dict[Home, Sequence[str]] = {
        Home.HOST: ("gradient", "update", "weights"),
        Home.STAGED: ("copy in", "update", "copy out"),
        Home.RESIDENT: ("update",),
    }
    for subgroup in optimizer.subgroups:
        events = [e for e in report.timeline.events if e.subgroup == subgroup.index]
        assert {e.what for e in events} == set(kinds[subgroup.home])
        if subgroup.home is Home.STAGED:
            moved = sum(e.bytes for e in events if e.what.startswith("copy"))
            # Two fp32 moments, in and out: the fp32 weight is its own master.
            assert moved == 2 * 8 * subgroup.elements
    assert 0 < report.update_seconds < 10
    assert report.exposed_seconds > 0


def test_every_strategy_trains_the_same_network(profile: HardwareProfile) -> None:
    results = [train(Case(strategy=name, subgroup_elements=150), profile) for name in STRATEGIES]
    for other in results[1:]:
        assert_same_bits(other, results[0])
