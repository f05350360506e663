"""State-space duality in chunks, in plain torch: a few large products instead of T small steps.

Inside a chunk the recurrence is written out as attention without softmax, a masked matrix of
products C_t B_s times decays; from chunk to chunk only the state is carried (Dao and Gu 2024,
arXiv 2405.21060, section 6 and listing 1). Memory is linear in T. Plain operations, therefore
differentiable to any order and compilable; this is what runs on a CPU.

Decays are exponentials of sums over what lies between two positions, never positive, and masked
before they are exponentiated.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

# B batch, T time, H heads, P head width, N state width
# G groups of R = H / G heads that share B and C, M chunks of Q positions


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    documents: torch.Tensor | None,
    state: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as the reference, in chunks of `chunk` positions.

    Documents may begin anywhere in a chunk: a decay across a border is zero.
    """
    length, groups = x.shape[1], B.shape[2]
    wide = state.dtype
    x, dt = (in_chunks(tensor.to(wide), chunk) for tensor in (x, dt))
    write, read = (in_chunks(keys.to(wide), chunk).transpose(2, 3) for keys in (B, C))
    # Padding has dt = 0: it neither decays the state nor adds to it.
    logs = (dt * A.to(wide)).transpose(2, 3).unflatten(2, (groups, -1))
    scaled = (dt.unsqueeze(-1) * x).transpose(2, 3).contiguous().unflatten(2, (groups, -1))
    decay = decays(logs, None if documents is None else in_chunks(documents, chunk, "last"))

    # Inside a chunk. The products C B^T are shared by the heads of a group.
    scores = (read @ write.transpose(-1, -2)).unsqueeze(3)
    y = (scores * decay.inside) @ scaled  # (B, M, G, R, Q, P)

    # What each chunk adds to the state by its end; the heads of a group lie side by side.
    weighted = (decay.to_end.unsqueeze(-1) * scaled).transpose(-1, -2)
    added = (weighted.flatten(3, 4) @ write).unflatten(3, weighted.shape[3:5])
    before, state = carry(added, decay.whole, state.unflatten(1, (groups, -1)))

    # What the state before a chunk gives to each of its positions.
    given = (before.flatten(3, 4) @ read.transpose(-1, -2)).unflatten(3, weighted.shape[3:5])
    y = y + decay.from_start.unsqueeze(-1) * given.transpose(-1, -2)
    y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)
    return y[:, :length], state.flatten(1, 2)


def in_chunks(tensor: torch.Tensor, chunk: int, padding: str = "zeros") -> torch.Tensor:
    """Cut (B, T, ...) into (B, M, Q, ...), the end filled with zeros or with the last entry."""
    missing = -tensor.shape[1] % chunk
    if missing and padding == "last":
        tensor = torch.cat([tensor, tensor[:, -1:].expand(-1, missing)], dim=1)
    elif missing:
        tensor = functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))
    return tensor.unflatten(1, (-1, chunk))


@dataclass(frozen=True, kw_only=True)
class Decays:
    """By what factor a contribution shrinks on its way; zero where a document ends in between."""

    inside: torch.Tensor
    """(B, M, G, R, Q, Q), from the second position to the first; zero for the future."""

    from_start: torch.Tensor
    """(B, M, G, R, Q), from the state before the chunk to a position."""

    to_end: torch.Tensor
    """(B, M, G, R, Q), from a position to the end of the chunk."""

    whole: torch.Tensor
    """(B, M, G, R), over the whole chunk."""


def decays(logs: torch.Tensor, documents: torch.Tensor | None) -> Decays:
    """Return the decays of log decays (B, M, G, R, Q) with documents (B, M, Q) or None.

    Sums run from every first position of its own. A difference of two sums from the beginning would
    lose what is small beside them, in the decays and, worse, in their gradients.
    """
    size, device = logs.shape[-1], logs.device
    seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    passed = torch.where(seen.tril(-1), logs.unsqueeze(-1), 0.0)
    sums = passed.cumsum(-2)
    from_start = logs.cumsum(-1).exp()
    whole = from_start[..., -1]
    if documents is not None:
        numbers = documents[:, :, None, None]  # (B, M, 1, 1, Q)
        last = numbers[..., -1:]
        # The state before the first chunk belongs to the first document.
        previous = torch.cat([numbers[:, :1, :, :, :1], last[:, :-1]], dim=1)
        seen = seen & (numbers.unsqueeze(-1) == numbers.unsqueeze(-2))
        from_start = torch.where(numbers == previous, from_start, 0.0)
        whole = torch.where((last == previous).squeeze(-1), whole, 0.0)
    inside = sums.masked_fill(~seen, float("-inf")).exp()
    return Decays(inside=inside, from_start=from_start, to_end=inside[..., -1, :], whole=whole)


def carry(
    added: torch.Tensor, whole: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state before every chunk (B, M, G, R, P, N), and the one after the last.

    Args:
        added: (B, M, G, R, P, N), what each chunk adds.
        whole: (B, M, G, R), by what each chunk lets the state decay.
        state: (B, G, R, P, N), the state before the first chunk.
    """
    before: list[torch.Tensor] = []
    # Unbound at once: the backward of a slice would fill a tensor of the full size per chunk.
    for new, factor in zip(added.unbind(1), whole[..., None, None].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(new, factor, state)
    return torch.stack(before, dim=1), state
