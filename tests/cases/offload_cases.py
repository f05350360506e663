"""Ways to train a few small parameters: through the engine, and in one piece without it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from interlace.kernels.update import (
    AdamW,
    CoordinateClip,
    Slab,
    Step,
    UpdateRule,
    sum_of_squares,
    update,
)
from interlace.kernels.update.histogram import magnitude_histogram, quantile_of
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import Throttle
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget

SIZES = ((7, 5), (3,), (64, 3), (11,), (130,), (1,), (20, 20), (5, 2, 3))


@dataclass
class Case:
    """One way to train a few parameters for a few steps.

    Attributes:
        homes: Homes given to subgroups in turn; empty keeps the strategy's choice.
    """

    dtype: torch.dtype = torch.float32
    strategy: str = "none"
    overlap: str = "none"
    clip: float | None = None
    accumulation: int = 1
    groups: int = 1
    subgroup_elements: int = 10**9
    homes: Sequence[Home] = ()
    rule: UpdateRule = field(default_factory=lambda: AdamW(lr=0.01, weight_decay=0.1))
    moment_dtype: torch.dtype = torch.float32
    split_master: bool = False
    steps: int = 4
    stride: int | None = None
    stream: bool | None = None
    device: str = "cpu"


class Part(nn.Module):
    """One parameter, drawn to a target."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, target: float) -> torch.Tensor:
        return ((self.weight.float() - target) ** 2).sum() + (self.weight.float() ** 3).sum() * 0.01


class Toy(nn.Module):
    """Parameters of many shapes in a row of small modules, so that forward order means
    something.
    """

    def __init__(self, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]] = SIZES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
        self.parts = nn.ModuleList(Part(weight) for weight in weights)

    def forward(self, target: float) -> torch.Tensor:
        return torch.stack([part(target) for part in self.parts]).sum()


def groups_of(model: nn.Module, number: int) -> list[dict[str, object]]:
    """Return the parameters dealt to so many groups, with different hyperparameters."""
    parameters = list(model.parameters())
    return [
        {"params": parameters[first::number], "lr": 0.01 * (first + 1)} for first in range(number)
    ]


def open_case(case: Case, profile: HardwareProfile) -> tuple[Toy, OffloadedOptimizer]:
    """Return a toy and its optimizer."""
    model = Toy(case.dtype).to(case.device)
    optimizer = OffloadedOptimizer(
        groups_of(model, case.groups),
        case.rule,
        strategy=case.strategy,
        budget=MemoryBudget(10**9, 10**9),
        profile=profile,
        overlap=case.overlap,
        clip_norm=case.clip,
        model=model if case.overlap != "none" else None,
        options=OffloadOptions(
            subgroup_elements=case.subgroup_elements,
            accumulation_steps=case.accumulation,
            moment_dtype=case.moment_dtype,
            split_master=case.split_master,
            stride=case.stride,
            stream_gradients=case.stream,
            cpu_threads=2,
        ),
    )
    if case.homes:
        count = len(optimizer.subgroups)
        optimizer.rehome([case.homes[n % len(case.homes)] for n in range(count)])
    return model, optimizer


def train(case: Case, profile: HardwareProfile) -> dict[str, torch.Tensor]:
    """Train a toy and return weights and state of every parameter, bit for bit comparable."""
    model, optimizer = open_case(case, profile)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step, g=g: 1.0 / (1 + g * step) for g in range(case.groups)]
    )
    for step in range(case.steps):
        for micro in range(case.accumulation):
            model(0.5 * step - micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    optimizer.finish_step()
    result: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        result[name] = parameter.detach().cpu().clone()
        result[f"{name}.master"] = optimizer.master(parameter).cpu().clone()
        learnt = ("threshold",) if policy_of(case.rule) == "lagged_quantile" else ()
        for key in ("step", *case.rule.moments, *learnt):
            result[f"{name}.{key}"] = optimizer.state[parameter][key].cpu().clone()
    optimizer.close()
    return result


def policy_of(rule: UpdateRule) -> str:
    """Return where the thresholds of a rule come from."""
    return rule.policy if isinstance(rule, CoordinateClip) else ""


def quantile(gradients: Sequence[torch.Tensor], case: Case, *, of_all: bool) -> float:
    """Return the quantile of some gradients in one piece: of all coordinates or of those that are
    not 0.
    """
    flat = torch.cat([gradient.view(-1) for gradient in gradients])
    return quantile_of(
        magnitude_histogram(flat, 1.0), case.rule.share, len(flat) if of_all else None
    )


def in_one_piece(case: Case) -> dict[str, torch.Tensor]:
    """Train the same toy without the engine: one flat slab per group, one update call each, or one
    for each parameter where these have thresholds of their own.
    """
    model = Toy(case.dtype)
    groups = groups_of(model, case.groups)
    master = {p: p.detach().float() for p in model.parameters()}
    moments = {p: [torch.zeros_like(m) for _ in case.rule.moments] for p, m in master.items()}
    learns = policy_of(case.rule) == "lagged_quantile"
    thresholds = dict.fromkeys(master, 0.0)
    for step in range(case.steps):
        gradient = {p: torch.zeros_like(m) for p, m in master.items()}
        for micro in range(case.accumulation):
            model(0.5 * step - micro).backward()
            for p in model.parameters():
                gradient[p] += p.grad
                p.grad = None
        squares = torch.stack([sum_of_squares(g.view(-1)) for g in gradient.values()])
        norm = math.sqrt(float(squares.cumsum(0)[-1]))
        scale = case.clip / (norm + 1e-6) if case.clip and norm > case.clip else 1.0
        for number, group in enumerate(groups):
            members = group["params"]
            flat = Slab(
                torch.cat([gradient[p].view(-1) for p in members]),
                torch.cat([master[p].view(-1) for p in members]),
                tuple(
                    torch.cat([moments[p][n].view(-1) for p in members]).to(case.moment_dtype)
                    for n in range(len(case.rule.moments))
                ),
            )
            hyper = {**case.rule.hyperparameters(), **group}
            hyper["lr"] = group["lr"] / (1 + number * step)
            if policy_of(case.rule) == "global_quantile":
                hyper["threshold"] = quantile(list(gradient.values()), case, of_all=True)
            if not learns:
                update(case.rule, flat, Step(step + 1, scale, hyper))
            start = 0
            for p in members:
                if learns:
                    own = Step(step + 1, scale, {**hyper, "threshold": thresholds[p]})
                    update(case.rule, flat, own, start=start, stop=start + p.numel())
                    if gradient[p].any():
                        value = quantile([gradient[p]], case, of_all=False)
                        thresholds[p] = float(torch.tensor(value))
                piece = slice(start, start + p.numel())
                master[p] = flat.master[piece].view(p.shape)
                moments[p] = [moment[piece].view(p.shape) for moment in flat.moments]
                with torch.no_grad():
                    p.copy_(master[p])
                start += p.numel()
    result: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        result |= {name: p.detach(), f"{name}.master": master[p]}
        result[f"{name}.step"] = torch.tensor(float(case.steps))
        named = zip(case.rule.moments, moments[p], strict=True)
        result |= {f"{name}.{key}": value for key, value in named}
        if learns:
            result[f"{name}.threshold"] = torch.tensor([thresholds[p]])
    return result


def assert_same_bits(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], case: object = ""
) -> None:
    """Fail unless two results are equal to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == [], case


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
