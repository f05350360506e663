"""A whole descent, and what of it is trained: the likelihood of the next tokens after the steps.

The two published recipes (arXiv 2507.02092, sections 3 and 4) differ in what they differentiate.
S1 trains every step by itself, from a constant start. S2 trains the last step's prediction only;
truncated, its gradient is that of the last step. A step before one that nothing flows back through
is taken without a graph.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.models.energy.inner_step import Step

TakeStep = Callable[[torch.Tensor, int], Step]
"""Takes a step from logits (B, T, V), noise included, on the landscape of the given number."""


class Descent(NamedTuple):
    """What a descent came to.

    Attributes:
        objective: What is differentiated, a scalar.
        row_losses: Nats per token of every step and row, (steps, B), without a graph.
        energies: Mean of every row before every step, (steps, B), without a graph.
        gradient_norms: Mean over positions of the length of a candidate's gradient, likewise.
        logits: After the last step, (B, T, V), without a graph.
    """

    objective: torch.Tensor
    row_losses: torch.Tensor
    energies: torch.Tensor
    gradient_norms: torch.Tensor
    logits: torch.Tensor


def descend(
    start: torch.Tensor,
    noise: Callable[[int], torch.Tensor | None],
    take: TakeStep,
    count: int,
    settings: EnergySection,
    targets: torch.Tensor,
    weight: float,
) -> Descent:
    """Take `count` steps from `start` and return the losses.

    Args:
        start: Logits (B, T, V).
        noise: Returns what is added before the step of a number, (B, T, V), or None.
        take: Takes a step.
        count: Steps.
        settings: What is detached and trained.
        targets: (B, T) int64.
        weight: Share of every row in the objective.
    """
    logits, losses, steps = start, list[torch.Tensor](), list[Step]()
    last_only = settings.loss_steps == "last"
    for number in range(count):
        last = number == count - 1
        constant = not last and (settings.truncate or (settings.detach and last_only))
        added = noise(number)
        before = logits.detach() if settings.detach else logits
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            step = take(before if added is None else before + added, number)
            logits = step.logits
            losses.append(losses_of_rows(logits, targets))
        # Without the logits, so that they go where nothing flows back through them.
        steps.append(step._replace(logits=step.energies))
    trained = losses[-1:] if last_only else losses
    return Descent(
        objective=weight * torch.stack(trained).mean(0).sum(),
        row_losses=torch.stack(losses).detach(),
        energies=torch.stack([step.energies.mean(-1) for step in steps]),
        gradient_norms=torch.stack([step.gradient_norms.mean(-1) for step in steps]),
        logits=logits.detach(),
    )


def losses_of_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return nats per token of every row, (B,), keeping only the logits (B, T, V)."""
    if not torch.is_grad_enabled():
        return likelihood(targets, logits)
    # The log-softmax would be kept otherwise, as large as the logits.
    kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return cast(torch.Tensor, kept(partial(likelihood, targets), logits))


def likelihood(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of the targets in every row, (B,)."""
    flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape).mean(-1)
