"""Block-sparse masks in FlexAttention's layout (`torch.nn.attention.flex_attention.BlockMask`).

A `BlockMask` lists, for every block of queries, the blocks of keys it sees whole and those it sees
in part; what a part is, its `mask_mod` says pair by pair. Here the lists become one table of kinds,
and `mask_mod` is asked once, for the blocks seen in part only.
"""

import weakref
from typing import Any

import torch

from interlace.kernels.attention.scoring import HIDDEN, WHOLE
from interlace.kernels.attention.shared import made_here_stays_here

READ: "weakref.WeakKeyDictionary[Any, tuple[torch.Tensor, torch.Tensor]]" = (
    weakref.WeakKeyDictionary()
)
"""Tables of the block masks that are alive: one mask serves all layers of all steps."""


def read_block_mask(block_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Scoring.kinds` and `Scoring.pairs` of a `BlockMask`, read once per mask."""
    if made_here_stays_here():
        return tables(block_mask)
    if block_mask not in READ:
        READ[block_mask] = tables(block_mask)
    return READ[block_mask]


def tables(block_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a `BlockMask` anew."""
    width = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, width)
    kinds = torch.full(partial.shape, HIDDEN, dtype=torch.int32, device=partial.device)
    if block_mask.full_kv_num_blocks is not None:
        whole = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, width)
        kinds.masked_fill_(whole, WHOLE)
    where = partial.nonzero()
    kinds[partial] = torch.arange(len(where), dtype=torch.int32, device=partial.device)
    return kinds, seen_pairs(block_mask, where)


def listed(counts: torch.Tensor, indices: torch.Tensor, width: int) -> torch.Tensor:
    """Return which blocks (B, H, Q blocks, `width`) the lists name: the first `counts` of each."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # One column more takes the entries that are not used.
    spare = torch.where(used, indices.long(), width)
    found = used.new_zeros((*indices.shape[:-1], width + 1))
    return found.scatter_(-1, spare, True)[..., :-1]


def seen_pairs(block_mask: Any, where: torch.Tensor) -> torch.Tensor:
    """Return the pairs seen in each partial block (N, block of queries, block of keys).

    Args:
        block_mask: The mask.
        where: (N, 4) batch, head, block of queries and block of keys of each.
    """
    block_q, block_kv = block_mask.BLOCK_SIZE
    queries, keys = block_mask.seq_lengths
    over_keys = torch.vmap(block_mask.mask_mod, in_dims=(None, None, None, 0))
    ask = torch.vmap(torch.vmap(over_keys, in_dims=(None, None, 0, None)))
    rows = where[:, 2, None] * block_q + torch.arange(block_q, device=where.device)
    columns = where[:, 3, None] * block_kv + torch.arange(block_kv, device=where.device)
    # The last blocks may stick out, where `mask_mod` need not know an answer.
    rows, columns = rows.clamp(max=queries - 1), columns.clamp(max=keys - 1)
    pairs = torch.zeros((len(where), block_q, block_kv), dtype=torch.bool, device=where.device)
    # Some at a time: the indices of all pairs together would take many times the mask's memory.
    for start in range(0, len(where), 64):
        part = slice(start, start + 64)
        pairs[part] = ask(where[part, 0], where[part, 1], rows[part], columns[part])
    return pairs
