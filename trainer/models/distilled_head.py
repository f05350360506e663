"""The loss of a student's head beside its teacher's, without the logits of a whole batch.

Of every token: the divergence KL(teacher || student) of the next-token distributions at a
temperature, times its square so that gradients keep their size (Hinton et al. 2015, arXiv
1503.02531), and the likelihood of the text. Tokens are cut into chunks; while a chunk's logits are
there its gradients are computed as well, as `interlace.kernels.linear_cross_entropy` does. It can
be differentiated once.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from interlace.kernels.cross_entropy import tokens_per_chunk


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """What counts how much in the objective, per token.

    Attributes:
        divergence: Weight of one token's divergence, already divided by how many are averaged.
        likelihood: Weight of one token's negative log-likelihood, likewise.
        temperature: Divides the logits of both in the divergence.
    """

    divergence: float
    likelihood: float
    temperature: float


class HeadInputs(NamedTuple):
    """What both heads work on.

    Attributes:
        hidden: The student's, (N, D).
        weight: Its head, (V, D).
        teacher_hidden: (N, E).
        teacher_weight: (V, E).
        targets: (N,) int64.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    targets: torch.Tensor


class HeadLosses(NamedTuple):
    """Losses of one batch, 0-d fp32 (fp64 for fp64 input).

    Attributes:
        objective: The weighted sum, with a graph.
        divergence: Sum over tokens of the divergence times the squared temperature.
        nll: Sum over tokens of the negative log-likelihood.
    """

    objective: torch.Tensor
    divergence: torch.Tensor
    nll: torch.Tensor


def distilled_head(inputs: HeadInputs, weights: HeadWeights) -> HeadLosses:
    """Return the losses of all tokens; the objective has a graph to hidden states and head, the
    sums are for the log.
    """
    rows = tokens_per_chunk(inputs.weight.shape[0])
    objective, divergence, nll = DistilledHead.apply(*inputs, weights, rows)
    return HeadLosses(objective, divergence, nll)


class DistilledHead(torch.autograd.Function):
    """Losses of a head, and the gradients of their weighted sum, computed together."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        targets: torch.Tensor,
        weights: HeadWeights,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute losses and gradients, chunk by chunk."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head, teacher_head = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            losses, of_logits = chunk(
                functional.linear(hidden[part], head).to(wide),
                functional.linear(teacher_hidden[part], teacher_head).to(wide),
                targets[part],
                weights,
            )
            sums += losses
            narrow = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[part] = narrow @ head
            if of_weight is not None:
                of_weight += (narrow.transpose(0, 1) @ hidden[part]).to(wide)
        ctx.gradients = (of_hidden, None if of_weight is None else of_weight.to(weight.dtype))
        objective = weights.divergence * sums[0] + weights.likelihood * sums[1]
        divergence, nll = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(divergence, nll)
        return objective, divergence, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what forward computed.

        Raises:
            NotImplementedError: Gradients are to be differentiated again.
        """
        # With create_graph=True, and only then, gradients are recorded here.
        if torch.is_grad_enabled():
            raise NotImplementedError("the loss of a distilled head is differentiable once")
        scaled = (
            None if part is None else part * grad_outputs[0].to(part.dtype)
            for part in ctx.gradients
        )
        return (*scaled, None, None, None, None, None)


def chunk(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    weights: HeadWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums (2,) of divergence and likelihood over a chunk of (n, V) logits, and the
    gradient of their weighted sum, (n, V).
    """
    heat = weights.temperature
    likely = logits.log_softmax(-1)
    ours = likely if heat == 1.0 else (logits / heat).log_softmax(-1)
    theirs = (teacher_logits / heat).log_softmax(-1)
    wanted = theirs.exp()
    divergence = heat**2 * (wanted * (theirs - ours)).sum()
    nll = functional.nll_loss(likely, targets, reduction="sum")
    gradient = (weights.divergence * heat) * (ours.exp() - wanted)
    if weights.likelihood:
        share = likely.exp()
        share[torch.arange(len(targets), device=targets.device), targets] -= 1
        gradient += weights.likelihood * share
    return torch.stack([divergence, nll]), gradient
