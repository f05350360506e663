"""Cross-entropy of a linear head without the logits of a whole batch in fp32.

Tokens are cut into chunks whose fp32 logits stay under a bound; with more than one chunk each is
recomputed in the backward pass, so at most one chunk's logits are alive at any time. Differentiable
to any order.
"""

from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK_BYTES = 64 * 2**20


class HeadLoss(NamedTuple):
    """Losses of one batch, 0-d fp32 (fp64 for fp64 input).

    Attributes:
        objective: What is minimised: the mean negative log-likelihood plus the z-loss.
        mean_nll: Mean negative log-likelihood in nats per token.
    """

    objective: torch.Tensor
    mean_nll: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float = 0.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadLoss:
    """Return the mean cross-entropy of `softmax(hidden @ weight.T)` against `targets`.

    Args:
        hidden: (N, D), any floating dtype.
        weight: (V, D), the head; cast to the dtype of `hidden`.
        targets: (N,) int64, each in [0, V).
        z_loss: Weight of the mean squared log-partition (PaLM, arXiv 2204.02311, section 5).
        chunk_bytes: Bound on the fp32 logits of one chunk; a chunk has at least one token.

    Raises:
        ValueError: Shapes do not agree, or there are no tokens.
    """
    agree = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not agree or targets.shape != hidden.shape[:1] or not len(targets):
        raise ValueError(
            "linear_cross_entropy takes hidden (N, D), weight (V, D) and targets (N,), N at least "
            f"1; got {list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    rows = tokens_per_chunk(weight.shape[0], chunk_bytes)
    whole = hidden.shape[0] <= rows
    sums: list[torch.Tensor] = []
    for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        if whole:
            sums.append(chunk_sums(part, weight, wanted, z_loss))
        else:
            sums.append(recomputed_chunk_sums(part, weight, wanted, z_loss))
    totals = torch.stack(sums).sum(0) / hidden.shape[0]
    # A copy: FSDP2 warns of modules that return views.
    return HeadLoss(objective=totals[0] + totals[1], mean_nll=totals[0].clone())


def tokens_per_chunk(vocabulary_size: int, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> int:
    """Return how many tokens' fp32 logits fit the bound, at least one."""
    return max(1, chunk_bytes // (4 * vocabulary_size))


def recomputed_chunk_sums(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """Same as `chunk_sums`; keeps only its inputs for the backward pass."""
    # Nothing in a chunk is random, so the generators' states need not be kept.
    sums = checkpoint(
        chunk_sums, hidden, weight, targets, z_loss, use_reentrant=False, preserve_rng_state=False
    )
    assert isinstance(sums, torch.Tensor)
    return sums


def chunk_sums(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """Return the summed negative log-likelihood and the summed z-loss of one chunk, shape (2,)."""
    logits = functional.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = functional.cross_entropy(logits, targets, reduction="sum")
    if z_loss == 0.0:
        return torch.stack([nll, torch.zeros_like(nll)])
    return torch.stack([nll, z_loss * logits.logsumexp(-1).square().sum()])
