"""Others who write or read weights between steps, and what waits for whom."""

import copy
import json
from pathlib import Path

import pytest
import torch
from offload_cases import (
    SLOW,
    Case,
    Toy,
    assert_close,
    groups_of,
    host,
    open_case,
    pair,
    torchs,
)
from ranks import run_on_ranks
from torch import nn

from interlace.kernels.update import AdamW
from interlace.offload import OffloadedOptimizer, OffloadOptions
from interlace.offload.hardware import HardwareProfile


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
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
    wrapped = nn.ModuleDict({"body": model, "head": nn.Linear(60, 1)})
    wrapped.forward = lambda x: wrapped["head"](wrapped["body"](x))
    inputs = torch.randn(4, 60)
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


class Nested(nn.Module):
    """Layers as lists of parts, which are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)]) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in self.layers:
            x = x + second(torch.tanh(first(x)))
        return x


class Parts(nn.Module):
    """A layer whose parts the model calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(40), nn.Linear(40, 40)


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Parts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.mix(layer.norm(x))
        return x


@pytest.mark.parametrize("kind", [Nested, Unusual])
def test_layers_that_are_never_called_are_waited_for_too(kind: type[nn.Module]) -> None:
    model = kind()
    twin = copy.deepcopy(model)
    optimizer = host(
        model, overlap="forward", options=OffloadOptions(subgroup_elements=1, throttle=SLOW)
    )
    plain = torchs(twin)
    inputs = torch.randn(4, 40)
    for _ in range(3):
        losses = []
        for net, updater in ((model, optimizer), (twin, plain)):
            updater.zero_grad()
            loss = net(inputs).square().mean()
            loss.backward()
            updater.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    optimizer.close()


def test_layers_of_a_bare_sequence_are_waited_for_one_by_one() -> None:
    from interlace.offload.forward import units

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    assert [part for part, _ in units(model)] == list(model)


def test_without_a_model_step_waits_for_an_update_begun_in_backward() -> None:
    model, twin = nn.Linear(60, 60), nn.Linear(60, 60)
    twin.load_state_dict(model.state_dict())
    optimizer = host(model, overlap="backward", waits=False, options=OffloadOptions(throttle=SLOW))
    plain = torchs(twin)
    for net, updater in ((model, optimizer), (twin, plain)):
        net(torch.ones(2, 60)).sum().backward()
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
    done = run_on_ranks(SHARDED, tmp_path)
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
