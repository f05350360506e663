"""How each contender of the race trains: one small class per engine, all with the same few methods.

An iteration is `loss`, `backward`, `update`, or `loss` and `backward_only`; what an engine does
beside the next iteration it goes on doing until `finish`. DeepSpeed is loaded by its own class.
"""

import importlib
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as distributed
from race_contenders import (
    BETAS,
    CLIP_NORM,
    EPSILON,
    STRIDE,
    WEIGHT_DECAY,
    Contender,
    deepspeed_settings,
)
from race_tracks import DEVICE_SHARE, STATE_BYTES, Track
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from interlace.kernels.update import AdamW, UpdateRule, clipped_sgd
from interlace.offload.deepspeed import attach
from interlace.offload.hardware import HardwareProfile
from interlace.offload.memory import HOST_SHARE, available_host_bytes
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.performance_model import lower_bound, predict_homes
from interlace.offload.schedule import HiddenWindow, MemoryBudget, Schedule
from interlace.trainer.parallel import shard
from interlace.trainer.world import World

LARGEST_SUBGROUP = 100_000_000
SUBGROUPS = 16
"""Of one rank's part of the model, at least: what is interleaved, and how finely `ratio` cuts."""


@dataclass(frozen=True)
class Forecast:
    """What the performance model expects, in seconds.

    Attributes:
        update: From the first to the last event.
        exposed: What no compute hides.
        bound: Below which no homes can bring the update.
    """

    update: float
    exposed: float
    bound: float


class Racer(Protocol):
    """One contender with its model, on one rank."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of (rows, length + 1) tokens, a scalar."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        ...

    def update(self) -> None:
        """Take the step; it may go on beside what follows."""
        ...

    def backward_only(self, loss: torch.Tensor) -> None:
        """Compute gradients and forget them: an iteration without an update."""
        ...

    def finish(self) -> None:
        """Wait for everything."""
        ...

    def forecast(self, forward: float, backward: float) -> Forecast | None:
        """Return what is expected beside passes of so many seconds; None of what is not ours."""
        ...

    def close(self) -> None:
        """End what runs beside this thread."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        world: The ranks.
        profile: What the machine can do for each of them.
    """

    world: World
    profile: HardwareProfile

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.world.device

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def synchronize_compute(self) -> None:
        """Wait for what is queued behind the newest kernel, but not for copies and updates."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def budget(self, parameters: int) -> MemoryBudget:
        """Return what the state of a rank with so many parameters may occupy."""
        host = int(HOST_SHARE * available_host_bytes() / self.world.size)
        return MemoryBudget(int(DEVICE_SHARE * STATE_BYTES * parameters), host)

    def options(self, parameters: int, window: HiddenWindow | None = None) -> OffloadOptions:
        """Return how our engine is told to work."""
        options = OffloadOptions(stride=STRIDE, subgroup_elements=subgroup_of(parameters))
        return options if window is None else replace(options, hidden_window=window)


def subgroup_of(parameters: int) -> int:
    """Return the parameters of a subgroup for a rank that has so many."""
    return max(1, min(LARGEST_SUBGROUP, parameters // SUBGROUPS))


def share_of(model: nn.Module, world: World) -> int:
    """Return how many of a whole model's parameters one rank updates."""
    return -(-sum(p.numel() for p in model.parameters()) // world.size)


class Torch:
    """FSDP2 with fp32 parameters and torch's fused AdamW, all on the device or all on the host."""

    def __init__(self, contender: Contender, track: Track, place: Place) -> None:
        self.place = place
        self.model: nn.Module = track.model(place.device).float()
        kind = place.device.type
        mesh = init_device_mesh(kind, (place.world.size,))
        precision = MixedPrecisionPolicy(param_dtype=track.dtype, reduce_dtype=torch.float32)
        policy: OffloadPolicy = OffloadPolicy()
        if contender.offloads:
            policy = CPUOffloadPolicy(pin_memory=kind == "cuda")
        for unit in (*self.model.layers, self.model):
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=policy,
                # Who has room for everything also keeps what it has gathered.
                reshard_after_forward=contender.offloads,
            )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=track.lr,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Racer`."""
        return self.model(tokens[:, :-1], tokens[:, 1:]).objective

    def backward(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        loss.backward()

    def update(self) -> None:
        """See `Racer`."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward_only(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        loss.backward()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """See `Racer`."""
        self.place.synchronize()

    def forecast(self, forward: float, backward: float) -> Forecast | None:
        """See `Racer`."""
        del forward, backward

    def close(self) -> None:
        """See `Racer`."""


class Ours:
    """Our optimizer over the shards of FSDP2, or over the plain model of one rank.

    AdamW with clipping by norm runs beside the next forward pass, clipped SGD beside backward too.
    """

    def __init__(self, contender: Contender, track: Track, place: Place) -> None:
        self.place = place
        self.model = track.model(place.device)
        parameters = share_of(self.model, place.world)
        shard(self.model, list(self.model.layers), place.world, 1, track.dtype)
        self.beside_backward = contender.rule == "clipped_sgd"
        rule: UpdateRule = AdamW(track.lr, BETAS, EPSILON, WEIGHT_DECAY)
        if self.beside_backward:
            rule = clipped_sgd(track.sgd_lr)
        self.budget = place.budget(parameters)
        forward, backward = self.passes(track)
        self.optimizer = OffloadedOptimizer(
            self.model.parameters(),
            rule,
            strategy=contender.strategy,
            budget=self.budget,
            profile=place.profile,
            overlap="backward" if self.beside_backward else "forward",
            clip_norm=CLIP_NORM if contender.clips else None,
            model=self.model,
            options=place.options(parameters, self.window(forward, backward)),
        )

    def passes(self, track: Track) -> tuple[float, float]:
        """Return the seconds of the shortest passes of this model, without an update."""
        tokens = track.tokens(0, self.place.world.rank, track.rows[0]).to(self.place.device)
        times: list[tuple[float, float]] = []
        for _ in range(3):
            start = time.perf_counter()
            loss = self.loss(tokens)
            self.place.synchronize()
            middle = time.perf_counter()
            loss.backward()
            self.place.synchronize()
            times.append((middle - start, time.perf_counter() - middle))
            self.model.zero_grad()
        return min(forward for forward, _ in times), min(backward for _, backward in times)

    def window(self, forward: float, backward: float) -> HiddenWindow:
        """Return what the update runs beside."""
        return HiddenWindow(
            backward=backward if self.beside_backward else 0.0, forward=forward, flush=backward
        )

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Racer`."""
        return self.model(tokens[:, :-1], tokens[:, 1:]).objective

    def backward(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        loss.backward()

    def update(self) -> None:
        """See `Racer`."""
        self.optimizer.step()

    def backward_only(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        # Beside backward an update begins with the first gradient; it must not see any.
        taps = self.optimizer.tapping(lambda *_: True) if self.beside_backward else nullcontext()
        with taps:
            loss.backward()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """See `Racer`."""
        self.optimizer.synchronize()
        self.place.synchronize()

    def forecast(self, forward: float, backward: float) -> Forecast | None:
        """See `Racer`."""
        window = self.window(forward, backward)
        return forecast_of(self.place.profile, self.optimizer.schedule, self.budget, window)

    def close(self) -> None:
        """See `Racer`."""
        self.optimizer.close()


class DeepSpeed:
    """An engine of DeepSpeed, ZeRO stage 3, as it is or with our update attached."""

    def __init__(self, contender: Contender, track: Track, place: Place) -> None:
        deepspeed = importlib.import_module("deepspeed")
        self.place = place
        if contender.engine == "deepspeed":
            compile_adam()
        model = track.model(place.device)
        parameters = share_of(model, place.world)
        subgroup = subgroup_of(parameters)
        on_device = place.budget(parameters).device_bytes
        settings = deepspeed_settings(
            contender,
            rows=track.rows[0],
            lr=track.lr,
            bf16=track.bf16,
            pin=place.device.type == "cuda",
            subgroup=subgroup,
            # Its resident subgroups keep a gradient in float32 beside the state.
            ratio=1.0 - on_device / ((STATE_BYTES + 4) * parameters),
        )
        client: torch.optim.Optimizer | None = None
        if contender.engine == "attached":
            del settings["optimizer"]
            settings["zero_force_ds_cpu_optimizer"] = False
            client = torch.optim.AdamW(
                model.parameters(), lr=track.lr, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
            )
        # The embedding and the head are read by the model itself, not by a module of their own.
        for shared in (model.embedding.weight, model.head_weight()):
            deepspeed.zero.register_external_parameter(model, shared)
        self.model = model
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=client,
            model_parameters=None if client else model.parameters(),
            config=settings,
        )
        self.attachment: Any = None
        if contender.engine == "attached":
            self.budget = place.budget(parameters)
            self.attachment = attach(
                self.engine,
                strategy=contender.strategy,
                budget=self.budget,
                profile=place.profile,
                options=place.options(parameters),
            )
            if self.attachment is None:
                raise RuntimeError("attach refused this engine; its warning says why")

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Racer`."""
        return self.engine(tokens[:, :-1], tokens[:, 1:]).objective

    def backward(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        self.engine.backward(loss)

    def update(self) -> None:
        """See `Racer`."""
        self.engine.step()

    def backward_only(self, loss: torch.Tensor) -> None:
        """See `Racer`."""
        self.engine.backward(loss)
        self.engine.optimizer.zero_grad()

    def finish(self) -> None:
        """See `Racer`."""
        self.place.synchronize()

    def forecast(self, forward: float, backward: float) -> Forecast | None:
        """See `Racer`."""
        if self.attachment is None:
            return None
        window = HiddenWindow(flush=backward)
        return forecast_of(self.place.profile, self.attachment.schedule, self.budget, window)

    def close(self) -> None:
        """See `Racer`."""
        self.engine.destroy()


def compile_adam() -> None:
    """Have DeepSpeed's Adam for the CPU compiled and loaded.

    With a GPU DeepSpeed asks for CUDA's compiler, of which this Adam makes no use; where there is
    none, it is compiled as on a machine without a GPU.

    Raises:
        Exception: It cannot be compiled at all.
    """
    try:
        importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder().load()
    except Exception:
        importlib.import_module("deepspeed.ops.op_builder.cpu").CPUAdamBuilder().load()


def forecast_of(
    profile: HardwareProfile, schedule: Schedule | None, budget: MemoryBudget, window: HiddenWindow
) -> Forecast | None:
    """Return what the model says of the homes there are, beside passes as they were measured."""
    if schedule is None:
        return None
    expected = predict_homes(profile, schedule, window).prediction
    bound = lower_bound(profile, schedule.subgroups, budget, window, schedule.staging_slots)
    return Forecast(expected.update_seconds, expected.exposed_seconds, bound)


def racer_of(contender: Contender, track: Track, place: Place) -> Racer:
    """Build a contender."""
    match contender.engine:
        case "fsdp2":
            return Torch(contender, track, place)
        case "interlace":
            return Ours(contender, track, place)
        case _:
            return DeepSpeed(contender, track, place)


def open_ranks(device: torch.device, rank: int, size: int, file: str) -> World:
    """Join the other ranks; also where there is one, since FSDP2 and DeepSpeed want a group."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=size
    )
    return World(rank, size, device)
