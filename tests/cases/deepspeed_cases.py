"""Training of a small model under DeepSpeed, with its own update and with ours, on every rank."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.optim.adamw import adamw

from interlace.offload import AdamW, OffloadOptions, load_profile
from interlace.offload.deepspeed import Attachment, attach, attaching
from interlace.offload.schedule import Home, MemoryBudget

WIDTH, BATCH = 24, 4


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        elements: Of a subgroup: `sub_group_size` in stage 3, else the length of a piece.
        homes: Homes given to subgroups in turn; empty keeps the strategy's choice.
        torchs_arithmetic: Update with torch's operations in torch's order.
        idle: Let a layer take no part in two steps of three.
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
        {"params": vectors, "lr": 0.004, "weight_decay": 0.0},
    ]
    if case.groups == 1:
        groups = [{"params": matrices + vectors, "weight_decay": 0.05}]
    match case.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
        case "adam":
            for group in groups:
                group["weight_decay"] = 0.0
            return torch.optim.Adam(groups, lr=0.01)
        case "cpu_adam":
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=0.01, betas=(0.9, 0.95))
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
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step, g=g: 2.0 ** -(step // (5 + 5 * g)) for g in range(case.groups)]
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config(case)
    )
    return engine, attached(engine, case) if ours else None


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


def compare(case: Case) -> dict[str, Any]:
    """Train a case both ways; return how far apart losses and tensors are."""
    seen, found = outcome(case, ours=False)
    our_seen, our_found = outcome(case, ours=True)
    losses = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(seen, our_seen, strict=True)]
    tensors = {name: apart(found[name], our_found[name]) for name in found}
    worst = max(tensors, key=lambda name: tensors[name])
    return {
        "losses": max(losses),
        "worst": worst,
        "tensors": tensors[worst],
        "same bits": seen == our_seen and all(torch.equal(found[n], our_found[n]) for n in found),
        "first": seen[0],
        "last": seen[-3],
    }
