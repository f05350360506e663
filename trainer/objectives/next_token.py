"""Objective `next_token`: the likelihood of every next token, and what goes with it.

The z-loss keeps the log-partition near zero (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section
5); blocks with experts add their balance losses.
"""

from collections.abc import Mapping

import torch

from interlace.trainer.batches import Batch
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models import cost
from interlace.trainer.models.language_model import LanguageLoss, LanguageModel
from interlace.trainer.models.model import Model
from interlace.trainer.models.registry import Flops
from interlace.trainer.objectives import Loss, objective
from interlace.trainer.plan import Plan
from interlace.trainer.world import World


@objective("next_token")
class NextToken:
    """Cross-entropy of a language model."""

    compiles = True

    def __init__(self, config: RunConfig, plan: Plan, world: World) -> None:
        self.z_loss = config.train.z_loss

    @classmethod
    def problems(cls, config: RunConfig) -> list[str]:
        """Every model that is built from blocks can be trained like this."""
        return []

    @classmethod
    def build(cls, config: RunConfig, vocabulary_size: int, dtype: torch.dtype) -> LanguageModel:
        """Return the model of a recipe, without values."""
        return LanguageModel(config.model, vocabulary_size, dtype)

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return likelihood and additions of one micro-batch."""
        found = predictions(model, batch, self.z_loss)
        return Loss(found.objective, found.mean_nll, found.expert_loads)

    def held_out_nll(self, model: Model, batch: Batch) -> torch.Tensor:
        """Return the likelihood alone."""
        return predictions(model, batch).mean_nll

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing is remembered."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing is remembered."""

    @classmethod
    def parameter_count(cls, config: RunConfig, vocabulary_size: int) -> int:
        """Return the parameters of stack, embedding and head."""
        return cost.parameter_count(config.model, vocabulary_size)

    @classmethod
    def flops_per_token(cls, config: RunConfig, vocabulary_size: int) -> Flops:
        """Return the cost of one pass."""
        return cost.flops_per_token(config.model, vocabulary_size, config.data.sequence_length)

    @classmethod
    def activation_bytes(
        cls, config: RunConfig, vocabulary_size: int, forward: cost.ForwardPass
    ) -> int:
        """Return what one pass keeps."""
        return cost.activation_bytes(config.model, vocabulary_size, forward)


def predictions(model: Model, batch: Batch, z_loss: float = 0.0) -> LanguageLoss:
    """Run a language model over a micro-batch, through the hooks of sharding."""
    found: LanguageLoss = model(
        batch.tokens,
        batch.targets,
        segments=batch.segments,
        positions=batch.positions,
        z_loss=z_loss,
    )
    return found
