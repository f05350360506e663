"""Cross-entropy of a linear head without the logits of a whole batch.

Tokens are cut into chunks whose fp32 logits stay under a bound. While a chunk's logits are there,
its share of the gradients is computed as well: three products in all, where recomputing the logits
in the backward pass would take four, and nothing of the size of logits outlives the forward pass.
No gradient is left out, however small. Backward scales what was computed; where more is asked of
it (a second derivative, a second backward pass, a gradient of `mean_nll` of its own) it
differentiates the plain formula instead, recomputing one chunk at a time, to any order.

torch has an operation with the same plan since 2.13, `F.linear_cross_entropy` with options. It is
not used here; benchmarks/step_ops.py runs it beside this. What was seen with torch 2.13 on a CPU:

* From bfloat16 it returns the loss in bfloat16, summed over chunks in bfloat16: 9.19 where 9.066 is
  exact, 8.81 where 9.036 is. Its gradient of the head is summed in bfloat16 as well.
* With `create_graph=True` the gradient comes back detached, without an error. With
  `allow_retain_graph`, which it forces under `torch.compile`, second derivatives are wrong,
  without an error.
* It has no z-loss. On a GPU it sums with `index_add_`, whose order differs from run to run, and a
  run here must be resumable to the last bit.
* It is not faster, and its reference path (`options=None`) makes the logits of the whole batch.
"""

from typing import Any, NamedTuple

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

    Products are taken in the dtype of `hidden`; softmax, losses and the sum over chunks of the
    head's gradient in fp32 at least. Differentiable to any order.

    Args:
        hidden: (N, D), any floating dtype.
        weight: (V, D), the head; cast to the dtype of `hidden`.
        targets: (N,) int64, each in [0, V).
        z_loss: Weight of the mean squared log-partition (PaLM, arXiv 2204.02311, section 5).
        chunk_bytes: Bound on the fp32 logits of one chunk; a chunk has at least one token.

    Raises:
        TypeError: `hidden` or `weight` is not floating, or `targets` is not int64.
        ValueError: Shapes or devices do not agree, or there are no tokens.
    """
    check(hidden, weight, targets)
    rows = tokens_per_chunk(weight.shape[0], chunk_bytes)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return HeadLoss(*LossWithGradients.apply(hidden, weight, targets, z_loss, rows))
    return plain_loss(hidden, weight, targets, z_loss, rows)


def check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise unless these are a head's inputs."""
    agree = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not agree or targets.shape != hidden.shape[:1] or not len(targets):
        raise ValueError(
            "linear_cross_entropy takes hidden (N, D), weight (V, D) and targets (N,), N at least "
            f"1; got {list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"linear_cross_entropy: {name} must be floating; got {tensor.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: targets must be int64; got {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            "linear_cross_entropy: hidden, weight and targets must be on one device; got "
            f"{hidden.device}, {weight.device} and {targets.device}"
        )


def tokens_per_chunk(vocabulary_size: int, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> int:
    """Return how many tokens' fp32 logits fit the bound, at least one."""
    return max(1, chunk_bytes // (4 * vocabulary_size))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a softmax over logits of `dtype` is computed."""
    return torch.promote_types(dtype, torch.float32)


def plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float, rows: int
) -> HeadLoss:
    """The plain twin: the formula, chunk by chunk; each chunk is recomputed in the backward pass
    where there is more than one.
    """
    one_chunk = hidden.shape[0] <= rows
    sums = [
        chunk_sums(part, weight, wanted, z_loss)
        if one_chunk
        else recomputed_chunk_sums(part, weight, wanted, z_loss)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return as_loss(torch.stack(sums).sum(0) / hidden.shape[0])


def as_loss(means: torch.Tensor) -> HeadLoss:
    """Return the losses of a mean negative log-likelihood and a mean z-loss."""
    # A copy: FSDP2 warns of modules that return views.
    return HeadLoss(objective=means[0] + means[1], mean_nll=means[0].clone())


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
    logits = logits.to(at_least_fp32(logits.dtype))
    nll = functional.cross_entropy(logits, targets, reduction="sum")
    if z_loss == 0.0:
        return torch.stack([nll, torch.zeros_like(nll)])
    return torch.stack([nll, z_loss * logits.logsumexp(-1).square().sum()])


class LossWithGradients(torch.autograd.Function):
    """The losses of `plain_loss`, with the gradients of the objective computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        z_loss: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute losses and gradients, chunk by chunk."""
        gradients = HeadGradients(hidden, weight, ctx.needs_input_grad[:2], rows)
        sums = [
            gradients.add_chunk(start, targets[start : start + rows], z_loss)
            for start in range(0, hidden.shape[0], rows)
        ]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.z_loss, ctx.rows = z_loss, rows
        ctx.gradients = gradients.finished()
        ctx.set_materialize_grads(False)
        return as_loss(torch.stack(sums).sum(0) / hidden.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Scale what forward computed, once and in place; anything else comes from the formula."""
        of_objective, of_nll = grad_outputs
        computed, ctx.gradients = ctx.gradients, None
        # With create_graph=True, and only then, gradients are recorded here.
        simple = of_objective is not None and of_nll is None and not torch.is_grad_enabled()
        if computed is None or not simple:
            return (*formula_gradients(ctx, of_objective, of_nll), None, None, None)
        scaled = (None if part is None else part.mul_(of_objective) for part in computed)
        return (*scaled, None, None, None)


def formula_gradients(
    ctx: Any, of_objective: torch.Tensor | None, of_nll: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Differentiate the plain twin, to the order that is asked for."""
    further = torch.is_grad_enabled()
    hidden, weight, targets = ctx.saved_tensors
    inputs = [
        tensor
        for tensor, needed in zip((hidden, weight), ctx.needs_input_grad[:2], strict=True)
        if needed
    ]
    with torch.enable_grad():
        loss = plain_loss(hidden, weight, targets, ctx.z_loss, ctx.rows)
        pairs = [
            (one, of)
            for one, of in zip(loss, (of_objective, of_nll), strict=True)
            if of is not None
        ]
        found = iter(
            torch.autograd.grad(
                [one for one, _ in pairs], inputs, [of for _, of in pairs], create_graph=further
            )
        )
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:2])


class HeadGradients:
    """Gradients of the mean objective with respect to hidden states and head, chunk by chunk.

    Args:
        hidden: (N, D).
        weight: (V, D).
        needed: Whether each of the two needs a gradient.
        rows: Tokens per chunk.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...], rows: int
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.head = weight.to(hidden.dtype)
        self.rows = rows
        self.needs_weight = needed[1]
        self.of_hidden = torch.empty_like(hidden) if needed[0] else None
        self.of_weight: torch.Tensor | None = None

    def add_chunk(self, start: int, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
        """Add one chunk's gradients; return its sums, as `chunk_sums` does."""
        part = self.hidden[start : start + self.rows]
        sums, of_logits = sums_and_gradient(
            functional.linear(part, self.head), targets, z_loss, 1.0 / self.hidden.shape[0]
        )
        if self.of_hidden is not None:
            torch.mm(of_logits, self.head, out=self.of_hidden[start : start + self.rows])
        if self.needs_weight:
            self.add_to_weight(of_logits, part)
        return sums

    def add_to_weight(self, of_logits: torch.Tensor, part: torch.Tensor) -> None:
        """Add one chunk to the gradient of the head, in fp32 at least where there are several."""
        if self.of_weight is None:
            product = of_logits.T @ part
            several = self.hidden.shape[0] > self.rows
            self.of_weight = product.to(at_least_fp32(product.dtype)) if several else product
        elif self.of_weight.dtype == part.dtype:
            torch.addmm(self.of_weight, of_logits.T, part, out=self.of_weight)
        else:
            self.of_weight.add_(of_logits.T @ part)

    def finished(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return both gradients in the dtypes of their inputs."""
        of_weight = self.of_weight
        return self.of_hidden, None if of_weight is None else of_weight.to(self.weight.dtype)


def sums_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one chunk's sums, as `chunk_sums` does, and their gradient with respect to the logits,
    times `share`. The gradient takes the place of the logits.
    """
    wanted, row = targets.unsqueeze(1), torch.arange(len(targets), device=targets.device)
    logs = functional.log_softmax(logits, dim=-1, dtype=at_least_fp32(logits.dtype))
    log_wanted = logs.gather(1, wanted)
    partition = logits.gather(1, wanted).to(logs.dtype) - log_wanted
    sums = torch.stack([-log_wanted.sum(), z_loss * partition.square().sum()])
    # d nll = p - [target]; d z-loss = 2 z log(Z) p.
    factor = share * (1.0 + 2.0 * z_loss * partition)
    of_wanted = factor * log_wanted.exp() - share
    torch.mul(logs.exp_(), factor, out=logits)
    # Overwritten, not added to, one entry per row: no order matters.
    logits[row, targets] = of_wanted.squeeze(1).to(logits.dtype)
    return sums, logits
