"""Objectives, one small file each: what a model is, what is minimised, and what that costs.

The loop asks an objective for the model and for the loss of a micro-batch and knows nothing else of
it. A recipe names one as `train.objective`; a plug-in registers its own with `@objective("name")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from interlace.trainer.registry import Registry

if TYPE_CHECKING:
    import torch

    from interlace.trainer.batches import Batch
    from interlace.trainer.config.schema import RunConfig
    from interlace.trainer.models.cost import ForwardPass
    from interlace.trainer.models.model import Model
    from interlace.trainer.models.registry import Flops
    from interlace.trainer.plan import Plan
    from interlace.trainer.world import World


@dataclass(frozen=True)
class Loss:
    """Losses of one micro-batch.

    Attributes:
        objective: What is differentiated, a scalar with a graph.
        mean_nll: Mean negative log-likelihood of the targets, nats per token.
        expert_loads: Choices per expert, (E,) int64, for each block with experts.
        details: More scalars for the log, by name; the mean over micro-batches and ranks is shown.
    """

    objective: torch.Tensor
    mean_nll: torch.Tensor
    expert_loads: Sequence[torch.Tensor] = ()
    details: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])


class Objective(Protocol):
    """What is trained for."""

    compiles: bool
    """Whether `torch.compile` may be used on the model's units."""

    def __init__(self, config: RunConfig, plan: Plan, world: World) -> None: ...

    @classmethod
    def problems(cls, config: RunConfig) -> list[str]:
        """Return what speaks against this objective with the rest of the recipe, a message each."""
        ...

    @classmethod
    def build(cls, config: RunConfig, vocabulary_size: int, dtype: torch.dtype) -> Model:
        """Return the model, without values; called under the meta device."""
        ...

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the losses of one training micro-batch."""
        ...

    def held_out_nll(self, model: Model, batch: Batch) -> torch.Tensor:
        """Return nats per token of a held-out micro-batch, a scalar without a graph."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Return what the objective itself remembers between steps, for checkpoints; every rank
        takes part and gets the whole. What `restore` is handed later has the same names.
        """
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, after it was filled from a checkpoint."""
        ...

    @classmethod
    def parameter_count(cls, config: RunConfig, vocabulary_size: int) -> int:
        """Return the number of trained parameters."""
        ...

    @classmethod
    def flops_per_token(cls, config: RunConfig, vocabulary_size: int) -> Flops:
        """Return the matrix FLOPs of one token of a training step."""
        ...

    @classmethod
    def activation_bytes(cls, config: RunConfig, vocabulary_size: int, forward: ForwardPass) -> int:
        """Return the peak of activations in one pass, in bytes."""
        ...


@runtime_checkable
class Freezes(Protocol):
    """An objective that leaves some parameters as they are."""

    def freeze(self, model: Model) -> None:
        """Mark what is not trained; called once, before the optimizer is built."""
        ...


@runtime_checkable
class Accompanied(Protocol):
    """An objective that keeps weights on the device which no optimizer sees."""

    @classmethod
    def untrained_bytes(
        cls, config: RunConfig, vocabulary_size: int, shards: int, bytes_per_element: int
    ) -> int:
        """Return what they take on one rank, where trained weights are cut into `shards`."""
        ...


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    "train.objective",
    {
        "next_token": "interlace.trainer.objectives.next_token",
        "energy": "interlace.trainer.objectives.energy",
        "distill": "interlace.trainer.objectives.distill",
    },
)

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def objective(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Register a class as the objective that recipes call by this name."""
    return OBJECTIVES.register(name)


def objective_of(config: RunConfig) -> type[Objective]:
    """Return the objective that a recipe names."""
    return OBJECTIVES.get(config.train.objective)
