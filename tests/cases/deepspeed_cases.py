"""Training of a small model under DeepSpeed, with its own update and with ours, on every rank."""

import itertools
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from torch import nn
from torch.optim.adamw import adamw

from interlace.offload import AdamW, OffloadOptions, load_profile
from interlace.offload.deepspeed import Attachment, attach, attaching, detach
from interlace.offload.schedule import Home, MemoryBudget

WIDTH, BATCH = 24, 4

# Collectives for inference, which DeepSpeed would compile for minutes before it trains on the CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        elements: Of a subgroup: `sub_group_size` in stage 3, else the length of a piece.
        homes: Homes given to subgroups in turn; empty keeps the strategy's choice.
        torchs_arithmetic: Update with torch's operations in torch's order.
        idle: Let a layer take no part in two steps of three.
        warmup: Follow DeepSpeed's `WarmupLR`.
    """

    stage: int
    optimizer: str = "adamw"
    dtype: str = "fp32"
    clip: float = 0.0
    accumulation: int = 1
    elements: int = 10**9
    homes: tuple[Home, ...] = ()
    groups: int = 2
    steps: int = 30
    fp16: dict[str, float] = field(default_factory=dict, hash=False)
    torchs_arithmetic: bool = False
    idle: bool = False
    warmup: bool = False


class TorchsAdamW(AdamW):
    """AdamW in the very operations of torch, in its order: no kernel serves it."""

    def plain(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
        number: int,
        hyper: Mapping[str, Any],
    ) -> None:
        beta1, beta2 = hyper["betas"]
        adamw(
            [weight],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [torch.tensor(float(number - 1))],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=hyper["lr"],
            weight_decay=hyper["weight_decay"],
            eps=hyper["eps"],
            maximize=False,
        )


class Toy(nn.Module):
    """A few layers of different sizes, the last with a bias of one element."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (WIDTH, 40, 17, 33, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.aside = nn.Linear(sizes[1], sizes[1], bias=False)

    def forward(self, x: torch.Tensor, idle: bool = False) -> torch.Tensor:
        for number, layer in enumerate(self.layers[:-1]):
            x = torch.tanh(layer(x))
            if number == 0 and not idle:
                x = x + self.aside(x)
        return self.layers[-1](x)


def client(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed is given: two groups, one without decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.001, "weight_decay": 0.0},
    ]
    if case.groups == 1:
        groups = [{"params": matrices + vectors, "weight_decay": 0.05}]
    match case.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.002, betas=(0.9, 0.95))
        case "adam":
            for group in groups:
                group["weight_decay"] = 0.0
            return torch.optim.Adam(groups, lr=0.002)
        case "cpu_adam":
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=0.002, betas=(0.9, 0.95))
        case _:
            for group in groups:
                group.update(lr=2.0**-5, weight_decay=0.0)
            return torch.optim.SGD(groups, lr=2.0**-5, momentum=0.5)


def config(case: Case) -> dict[str, Any]:
    """Return the configuration of DeepSpeed."""
    ranks = torch.distributed.get_world_size()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "train_batch_size": BATCH * case.accumulation * ranks,
        "gradient_clipping": case.clip,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": case.stage,
            "offload_optimizer": {"device": "cpu"},
            "sub_group_size": case.elements,
            "stage3_param_persistence_threshold": 10,
        },
    }
    if case.dtype == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8, **case.fp16}
    if case.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def open_engine(case: Case, ours: bool) -> tuple[Any, Attachment | None]:
    """Return an engine, and what is attached to it."""
    # DeepSpeed trusts few CPUs with float16; they all can, slowly.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(7)
    model = Toy()
    optimizer = client(case, model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler(case, optimizer),
        config=config(case),
    )
    return engine, attached(engine, case) if ours else None


def scheduler(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    """Return a schedule of powers of two, different for every group; DeepSpeed's own warms up."""
    if case.warmup:
        return WarmupLR(optimizer, warmup_max_lr=[0.002, 0.001], warmup_num_steps=8)
    shares = [lambda step, g=g: 2.0 ** -(step // (5 + 5 * g)) for g in range(case.groups)]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, shares)


def attached(engine: Any, case: Case) -> Attachment:
    """Attach, with a subgroup size and homes as a case has them."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error", UserWarning)
        if case.torchs_arithmetic:
            patch.setattr(attaching, "rule_of", lambda optimizer: TorchsAdamW())
        attachment = attach(
            engine,
            profile=load_profile("4xh100-pcie5"),
            budget=MemoryBudget(10**9, 10**9),
            strategy="host",
            options=OffloadOptions(subgroup_elements=case.elements, cpu_threads=2),
        )
    assert attachment is not None
    if case.homes:
        count = len(attachment.homes)
        attachment.rehome([case.homes[n % len(case.homes)] for n in range(count)])
    return attachment


def batches(case: Case, first: int, steps: int) -> Sequence[list[torch.Tensor]]:
    """Return the micro-batches of some steps, different on every rank."""
    rank = torch.distributed.get_rank()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    made: list[list[torch.Tensor]] = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        shape = (BATCH, WIDTH)
        micro = [torch.randn(shape, generator=generator) for _ in range(case.accumulation)]
        made.append([x.to(dtype) for x in micro])
    return made


def train(engine: Any, case: Case, first: int = 0, steps: int | None = None) -> list[float]:
    """Train; return the loss of every micro-batch and, after each step, norm and loss scale."""
    seen: list[float] = []
    for number, step in enumerate(batches(case, first, case.steps if steps is None else steps)):
        idle = case.idle and number % 3 > 0
        for x in step:
            loss = ((engine(x, idle).float() - x.float().sum(1, keepdim=True)) ** 2).mean()
            engine.backward(loss)
            engine.step()
            seen.append(float(loss.detach()))
        seen += [float(engine.get_global_grad_norm() or 0.0), float(engine.optimizer.loss_scale)]
    return seen


def contents(engine: Any, case: Case) -> dict[str, torch.Tensor]:
    """Return masters and weights of all parameters, and what the optimizer's state holds."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        found[f"{name}.master"] = safe_get_full_fp32_param(parameter).clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
            found[f"{name}.weight"] = parameter.detach().float().clone()
    for number, tensor in enumerate(flats(engine)):
        for key, value in engine.optimizer.optimizer.state[tensor].items():
            found[f"{number}.{key}"] = torch.as_tensor(value).float().clone()
    return found


def flats(engine: Any) -> list[torch.Tensor]:
    """Return the flat masters of this rank."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def outcome(case: Case, ours: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a case from the start; return what was seen and what came of it."""
    engine, _ = open_engine(case, ours)
    seen = train(engine, case)
    found = contents(engine, case)
    engine.destroy()
    return seen, found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two tensors relative to the largest of their numbers."""
    scale = float(torch.maximum(one.abs().max(), other.abs().max()))
    return float((one - other).abs().max()) / scale if scale else 0.0


# ---- what is shown --------------------------------------------------------------------------


def close_to(seen: Sequence[float], ours: Sequence[float]) -> float:
    """Return how far apart two lists of numbers are, relatively, at most."""
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(seen, ours, strict=True))


def compare(case: Case) -> dict[str, Any]:
    """Train a case both ways; return how far apart numbers and tensors are."""
    seen, found = outcome(case, ours=False)
    our_seen, our_found = outcome(case, ours=True)
    tensors = {name: apart(found[name], our_found[name]) for name in found}
    return {
        "numbers": close_to(seen, our_seen),
        "tensors": max(tensors.values()),
        "same bits": seen == our_seen and not any(tensors.values()),
        "scales": len(set(seen[case.accumulation + 1 :: case.accumulation + 2])),
    }


def resume(case: Case, folder: str, *, ours_saves: bool) -> dict[str, Any]:
    """Save after three steps, load under the other update, into an engine that has trained a
    little, and go on; return how far it is from who saved and went on.
    """
    half = case.steps // 2
    engine, _ = open_engine(case, ours_saves)
    train(engine, case, 0, half)
    engine.save_checkpoint(folder, tag=str(half))
    seen = train(engine, case, half, half)
    found = contents(engine, case)
    engine.destroy()
    other, _ = open_engine(case, not ours_saves)
    train(other, case, 50, 2)
    other.load_checkpoint(folder, tag=str(half))
    our_seen = train(other, case, half, half)
    our_found = contents(other, case)
    other.destroy()
    apart_most = max(apart(found[name], our_found[name]) for name in found)
    return {"numbers": close_to(seen, our_seen), "tensors": apart_most}


def change_over(case: Case) -> dict[str, Any]:
    """Train with DeepSpeed's update, then ours, then DeepSpeed's again; return whether that is the
    same, to the last bit, as without ours, and what is left on the optimizer.
    """
    third = case.steps // 3
    seen, found = outcome(case, ours=False)
    engine, _ = open_engine(case, ours=False)
    before = set(vars(engine.optimizer))
    our_seen = train(engine, case, 0, third)
    attached(engine, case)
    our_seen += train(engine, case, third, third)
    detach(engine)
    left = set(vars(engine.optimizer)) - before
    our_seen += train(engine, case, 2 * third, case.steps - 2 * third)
    our_found = contents(engine, case)
    engine.destroy()
    same = all(torch.equal(found[name], our_found[name]) for name in found)
    return {"same bits": seen == our_seen and same, "left": sorted(left)}


def accessors(case: Case) -> dict[str, Any]:
    """Read and write masters, moments and gradients by DeepSpeed's functions, between steps and
    between backward and step; return what they give both ways.
    """
    return {
        "same bits": all(
            torch.equal(a, b)
            for a, b in zip(accessed(case, False), accessed(case, True), strict=True)
        )
    }


def accessed(case: Case, ours: bool) -> list[torch.Tensor]:
    """Return what DeepSpeed's functions give in the course of three steps."""
    engine, _ = open_engine(case, ours)
    parameters = list(engine.module.parameters())
    given: list[torch.Tensor] = []
    for [x] in batches(case, 0, 3):
        engine.backward((engine(x).float() ** 2).mean())
        for parameter in parameters:
            gradient = safe_get_full_grad(parameter).clone()
            given.append(gradient)
            # ZeRO-3 can write only what all ranks have equally much of.
            if gradient.numel() % 2 == 0:
                safe_set_full_grad(parameter, gradient * 1.5)
        engine.step()
        for parameter in parameters:
            master = safe_get_full_fp32_param(parameter).clone()
            moment = safe_get_full_optimizer_state(parameter, "exp_avg").clone()
            given += [master, moment]
            if master.numel() % 2 == 0:
                safe_set_full_fp32_param(parameter, master * 0.75)
                safe_set_full_optimizer_state(parameter, moment * 0.5, "exp_avg")
    engine.destroy()
    return given


def refused(case: Case, name: str) -> dict[str, Any]:
    """Attach where a name is missing or, if that is a number, with DeepSpeed of that version, and
    train; return the warnings, and whether the numbers are DeepSpeed's own.
    """
    seen, _ = outcome(case, ours=False)
    engine, _ = open_engine(case, ours=False)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        # DeepSpeed's own step needs the name, so it is there again when that runs.
        if name[0].isdigit():
            patch.setattr(deepspeed, "__version__", name)
        else:
            patch.delattr(type(engine.optimizer), name)
        attachment = attach(engine)
    said = [str(warning.message) for warning in caught if "attached" in str(warning.message)]
    our_seen = train(engine, case)
    engine.destroy()
    return {"attached": attachment is not None, "said": said, "same bits": seen == our_seen}


def report(shown: Mapping[str, Callable[[], Any]]) -> None:
    """Show it all on every rank; rank 0 writes what came of it into `shown.json`."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    results = {name: show() for name, show in shown.items()}
    if torch.distributed.get_rank() == 0:
        Path("shown.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
