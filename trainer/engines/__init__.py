"""Engines: how a model is spread over the ranks, differentiated and updated.

A recipe names one (`parallel.engine`). The loop, checkpoints and diagnostics know this protocol
only, so that a run moves from one engine to another: `fsdp2` has the weights in FSDP2 units, or
plain on a single rank, and `OffloadedOptimizer` behind them; `zero` hands the model to DeepSpeed
and the interleaved update to DeepSpeed's optimizer. DeepSpeed is loaded where a recipe asks for it
and nowhere else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import nn

from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import Overlap
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import Schedule
from interlace.trainer.checkpoint.live import Live
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.plan import Plan
from interlace.trainer.world import World

OnReport = Callable[[UpdateReport, Schedule | None, HardwareProfile | None], None]
"""Is told of every update that is over: times, and homes and machine as the model saw them."""


class Engine(Protocol):
    """A model that is spread over the ranks, and the optimizer of its state. Every rank calls every
    method.
    """

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of how it was built."""
        ...

    @property
    def documents(self) -> Mapping[str, Mapping[str, object]]:
        """What a run folder shows of it as JSON, by file name."""
        ...

    @property
    def moments(self) -> Sequence[str]:
        """What the update rule remembers of a parameter, by name."""
        ...

    @property
    def guards(self) -> bool:
        """Whether updates take coordinates of the gradient that are not finite as 0."""
        ...

    @property
    def overlap(self) -> Overlap:
        """What updates run beside."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose parameter groups hold the hyperparameters, which are read at every step."""
        ...

    @property
    def update_begun(self) -> bool:
        """Whether gradients of this step have led to updates already."""
        ...

    def backward(self, objective: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch, a scalar's; `last` of the step or not."""
        ...

    def gradient_norm(self) -> float:
        """Return the global 2-norm of the gradients of this step; NaN if it is not finite."""
        ...

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parameters and what this rank has of their gradients, before clipping."""
        ...

    def squares(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield the same parameters and the sums of squares of what this rank has."""
        ...

    def weight_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what this rank has of a parameter as it computes with it, in any shape."""
        ...

    def copies_of(self, parameter: torch.Tensor) -> int:
        """Return how many ranks have the same part of a parameter's gradient as this one."""
        ...

    def step(self) -> None:
        """Update all weights, clipped as the recipe has it, and forget the gradients."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients of this step without an update."""
        ...

    def finish_step(self) -> None:
        """Wait for the update under way; state may be read afterwards."""
        ...

    def newest_report(self) -> UpdateReport | None:
        """Return the report of the newest update that is complete. One that runs beside the next
        forward is not waited for.
        """
        ...

    def finish_report(self) -> UpdateReport | None:
        """Wait for the update under way and return its report."""
        ...

    def on_report(self, take: OnReport) -> None:
        """Have every report of an update given to `take`."""
        ...

    def live(self, model: nn.Module) -> list[Live]:
        """Return where weights and their state lie, in the order of the model's parameters; no
        update is under way.
        """
        ...

    def adopt(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make what `live` returned, by key and after it was filled from a checkpoint, the live
        state.
        """
        ...

    def close(self) -> None:
        """End what the engine began; the run is over, well or badly. May be called again."""
        ...


class Builder(Protocol):
    """What the module of an engine has: the two steps in which it is built."""

    def spread(self, model: Model, config: RunConfig, world: World, dtype: torch.dtype) -> None:
        """Spread a model without values over the ranks, and give it memory for them."""
        ...

    def open_engine(
        self,
        model: Model,
        config: RunConfig,
        plan: Plan,
        hardware: HardwareProfile,
        manifest: Manifest,
        world: World,
    ) -> Engine:
        """Return the engine of a model that has its first values.

        Raises:
            ConfigError: The recipe asks for what it cannot do here, or state does not fit.
        """
        ...


MODULES = {
    "fsdp2": "interlace.trainer.engines.fsdp2",
    "deepspeed": "interlace.trainer.engines.zero.engine",
}


def builder_of(config: RunConfig) -> Builder:
    """Return the builder of the engine that a recipe names."""
    return import_module(MODULES[config.parallel.engine])  # pyright: ignore[reportReturnType]
