"""Held-out loss: nats per token, bits per byte and perplexity over a fixed set of rows.

Bits per byte make tokenizers comparable: nats per token / ln 2, times tokens per byte of text over
the whole validation split. The rows are the same at every validation and the training state is not
touched.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from interlace.trainer.batches import StepBatches
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Objective
from interlace.trainer.world import World


@dataclass(frozen=True)
class Validation:
    """One validation: mean loss in nats per token, bits per byte of text, perplexity, seconds
    taken.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    seconds: float


@torch.no_grad()
def validate(
    model: Model,
    objective: Objective,
    batches: StepBatches,
    world: World,
    beat: Callable[[], None],
) -> Validation:
    """Measure the model on the validation rows; every rank takes part and gets the same answer.

    Args:
        model: The model.
        objective: What measures a loss.
        batches: Where the rows come from.
        world: The ranks.
        beat: Called at every micro-batch: a sign of life, since all of them may take hours.
    """
    start = time.perf_counter()
    totals = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for batch, counted in batches.of_validation():
        beat()
        loss = float(objective.held_out_nll(model, batch))
        totals += counted * torch.tensor([loss, 1.0], dtype=torch.float64)
    model.train()
    totals = world.sum(totals)
    mean = float(totals[0] / totals[1])
    bits = mean / math.log(2) / batches.validation_bytes_per_token
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Validation(mean, bits, perplexity, time.perf_counter() - start)
