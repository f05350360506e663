"""The engine `fsdp2`: FSDP2 units on several ranks, the plain module on one, and
`OffloadedOptimizer` behind either.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from interlace.offload.gradients import squares_of
from interlace.offload.hardware import HardwareProfile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import Overlap
from interlace.offload.report import UpdateReport
from interlace.offload.subgroup import THRESHOLD, Member, SubgroupState
from interlace.trainer.checkpoint.live import Live
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines import Engine, OnReport
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.optimizer import build_optimizer
from interlace.trainer.parallel import shard
from interlace.trainer.plan import Plan
from interlace.trainer.world import World


class Fsdp2Engine:
    """What `Engine` says, by `OffloadedOptimizer`.

    Args:
        optimizer: Of all parameters that are trained.
        ranks: Of the run.
    """

    notes: Sequence[str] = ()
    documents: Mapping[str, Mapping[str, object]] = MappingProxyType({})

    def __init__(self, optimizer: OffloadedOptimizer, ranks: int = 1) -> None:
        self.optimizer = optimizer
        self.ranks = ranks
        self.moments = optimizer.rule.moments
        self.guards = optimizer.guards
        self.overlap: Overlap = optimizer.overlap

    @property
    def update_begun(self) -> bool:
        """Whether gradients of this step have led to updates already."""
        return self.optimizer.update_begun

    def backward(self, objective: torch.Tensor, last: bool) -> None:
        """Differentiate; the optimizer counts for itself which micro-batch is the last."""
        objective.backward()

    def gradient_norm(self) -> float:
        """Return the norm over all shards."""
        return self.optimizer.gradient_norm()

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parameters and their gradients, this rank's shards."""
        return self.optimizer.gradients()

    def squares(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield parameters and sums of squares, which are known from the norm."""
        # Takes in what no hook has taken; the norm itself is known and costs nothing.
        self.optimizer.gradient_norm()
        for member, square in squares_of(self.optimizer.subgroups):
            yield member.parameter, float(square)

    def weight_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard, or all of it on a single rank."""
        weight = parameter.detach()
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def copies_of(self, parameter: torch.Tensor) -> int:
        """Return how many ranks hold the same part of a parameter."""
        if not isinstance(parameter, DTensor):
            return self.ranks
        mesh = parameter.device_mesh
        same = [
            mesh.size(dimension)
            for dimension, placement in enumerate(parameter.placements)
            if isinstance(placement, Replicate)
        ]
        return math.prod(same)

    def step(self) -> None:
        """Update; with overlap the update goes on beside what follows."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Forget the gradients of this step."""
        self.optimizer.zero_grad()

    def finish_step(self) -> None:
        """Wait for the update under way."""
        self.optimizer.finish_step()

    def newest_report(self) -> UpdateReport | None:
        """Return the newest report; with overlap that of a step before, without waiting."""
        return self.finish_report() if self.overlap == "none" else self.optimizer.monitor.last

    def finish_report(self) -> UpdateReport | None:
        """Wait for the update under way and return its report."""
        return self.optimizer.finish_report()

    def on_report(self, take: OnReport) -> None:
        """Have every report given to `take`."""
        optimizer = self.optimizer

        def told(report: UpdateReport) -> None:
            take(report, optimizer.schedule, optimizer.placement.profile)

        optimizer.monitor.on_report = told

    def live(self, model: nn.Module) -> list[Live]:
        """Return masters, step counts, moments and learnt thresholds; of frozen parameters, which
        the optimizer knows nothing of, the weights.
        """
        served = {
            member.parameter: (subgroup, member)
            for subgroup in self.optimizer.subgroups
            for member in subgroup.members
        }
        found: list[Live] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found += self.of_parameter(name, *served[parameter])
            else:
                found.append(Live(f"model.{name}", parameter.detach(), frozen=True))
        return found

    def of_parameter(self, name: str, subgroup: SubgroupState, member: Member) -> list[Live]:
        """Return a trained parameter's master and what the update rule remembers of it."""
        high, remainder = subgroup.planes_of(member)
        state = self.optimizer.state[member.parameter]
        found = [Live(f"model.{name}", member.shaped(high), remainder, subgroup, member)]
        for key in ("step", *self.moments, THRESHOLD):
            if key in state:
                found.append(Live(f"optimizer.{name}.{key}", state[key], None, subgroup, member))
        return found

    def adopt(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write masters, and weights from them; the rest was filled where it lies."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.optimizer.set_master(parameter, tensors[f"model.{name}"])

    def close(self) -> None:
        """Nothing: an optimizer that is dropped ends its threads, and after a failure it is needed
        for the evidence.
        """


def spread(model: Model, config: RunConfig, world: World, dtype: torch.dtype) -> None:
    """Turn the model into FSDP2 units, if there are several ranks, with memory on the device."""
    shard(model, model.units, world, config.parallel.replicas, dtype)
    model.to_empty(device=world.device)


def open_engine(
    model: Model,
    config: RunConfig,
    plan: Plan,
    hardware: HardwareProfile,
    manifest: Manifest,
    world: World,
) -> Fsdp2Engine:
    """Return the engine of a model that has its first values.

    Raises:
        ConfigError: State does not fit the memory.
    """
    optimizer = build_optimizer(model, config, plan, hardware, manifest)
    return Fsdp2Engine(optimizer, world.size)


def own_optimizer(engine: Engine) -> OffloadedOptimizer:
    """Return the optimizer of this engine, for what no other has: gradients one by one as they
    come, and state by subgroup. Recipes that ask for such a thing with another engine are refused
    before it is built.
    """
    assert isinstance(engine, Fsdp2Engine), "checked with the recipe"
    return engine.optimizer
