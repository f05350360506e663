"""Many small SwiGLU blocks, each for its own share of the tokens, and the way there and back.

No token is dropped and no expert is padded: the choices are sorted by expert, so that every expert
sees a contiguous run of rows (MegaBlocks, Gale et al. 2023, arXiv 2211.15841, without its sparse
kernels). On a GPU in bfloat16 torch's grouped product does all experts at once; elsewhere a loop
over the experts does the same. Every sum has a fixed order: a token's copies are added one after
the other, and nothing is added by atomics to a place that another adds to.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from interlace.kernels import swiglu

GROUPED_ALIGNMENT = 8
"""Both widths of a grouped product in bfloat16 are a multiple of this: 16 bytes."""


class Experts(nn.Module):
    """SwiGLU blocks `down(silu(gate(x)) * up(x))`, stacked along the first dimension."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Send (N, D) rows through their experts.

        Args:
            rows: (N, D), sorted by expert.
            ends: (E,) int32, where the rows of each expert end.

        Returns:
            (N, D) in the dtype of `rows`.
        """
        product = grouped if can_group(rows, self.gate.shape[1]) else one_by_one
        return product(rows, ends, self.gate, self.up, self.down)


def can_group(rows: torch.Tensor, hidden: int) -> bool:
    """Whether torch's grouped product is a kernel of its own for rows (N, D) and this width."""
    aligned = not (rows.shape[1] % GROUPED_ALIGNMENT or hidden % GROUPED_ALIGNMENT)
    return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned


def grouped(
    rows: torch.Tensor,
    ends: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Send (N, D) rows through all experts in three products, without asking the device for their
    numbers.
    """
    gate, up, down = (weight.to(rows.dtype).transpose(1, 2) for weight in (gate, up, down))
    hidden = swiglu(
        functional.grouped_mm(rows, gate, offs=ends), functional.grouped_mm(rows, up, offs=ends)
    )
    return functional.grouped_mm(hidden, down, offs=ends)


def one_by_one(
    rows: torch.Tensor,
    ends: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Send (N, D) rows through one expert after another; one without rows costs nothing, and its
    gradient is zero.
    """
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    # Split and unbound once: backward then puts every gradient together in one piece.
    parts = zip(rows.split(counts), gate.unbind(), up.unbind(), down.unbind(), strict=True)
    results: list[torch.Tensor] = []
    for part, *weights in parts:
        if len(part):
            to_gate, to_up, to_down = (weight.to(rows.dtype) for weight in weights)
            hidden = swiglu(functional.linear(part, to_gate), functional.linear(part, to_up))
            results.append(functional.linear(hidden, to_down))
    return torch.cat(results) if results else torch.zeros_like(rows)


class Spread(torch.autograd.Function):
    """Copies of tokens in the order of their experts; backward adds each token's copies up.

    Indexing alone would add them by atomics, in any order.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        """Return (N k, D) rows of (N, D) tokens: row `r` is choice `order[r]`."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return tokens.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient of the tokens, to be differentiated again where asked for."""
        (inverse,) = ctx.saved_tensors
        rows = grad_outputs[0].index_select(0, inverse)
        return rows.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def through_experts(
    tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: Experts
) -> torch.Tensor:
    """Return the weighted sum of what each token's experts make of it.

    Args:
        tokens: (N, D).
        chosen: (N, k) int64, the numbers of each token's experts.
        weights: (N, k), their weights.
        experts: Called with the rows in order.

    Returns:
        (N, D) in the dtype of `tokens`.
    """
    choices = chosen.flatten()
    order = choices.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    numbers = torch.arange(experts.gate.shape[0], device=order.device)
    ends = torch.searchsorted(choices[order], numbers, right=True, out_int32=True)
    rows = Spread.apply(tokens, order, inverse, chosen.shape[1])
    assert isinstance(rows, torch.Tensor)
    results = experts(rows, ends).index_select(0, inverse).unflatten(0, chosen.shape)
    return (results * weights.to(tokens.dtype)[..., None]).sum(1)
