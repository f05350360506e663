"""Dilated neighbourhoods as plain windows over tokens sorted by residue.

A query that sees every r-th key sees all keys of its own residue modulo r. Sorted by residue, those
are neighbours: dilation becomes a permutation, windows and causal order keep their meaning, counted
in steps of r, and every back end and every derivative carries over.
"""

from dataclasses import replace

import torch

from interlace.kernels.attention.options import Options, describe, in_segments
from interlace.kernels.attention.scoring import Scoring


def dilated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Scoring, torch.Tensor]:
    """Return permuted queries, keys and values, their scoring, and the order that undoes it.

    `result.index_select(2, order)` puts a result (B, H, T, ...) back in place.
    """
    queries, keys, step = q.shape[2], k.shape[2], options.dilation
    # On the CPU, since the order follows from the lengths alone.
    order = torch.arange(keys, device="cpu").remainder(step).argsort(stable=True)
    is_query = order >= keys - queries
    of_queries = order[is_query] - (keys - queries)
    aligned = is_query.nonzero().squeeze(1).to(q.device)
    undo, of_queries, order = (x.to(q.device) for x in (of_queries.argsort(), of_queries, order))
    residues = torch.arange(keys, device=q.device) % step
    ids = (residues + step * documents(k, options)).index_select(1, order)
    slopes = options.alibi_slopes
    plain = replace(
        options,
        segment_ids=None,
        cu_seqlens=None,
        alibi_slopes=None if slopes is None else step * slopes,
    )
    diagonal = aligned.int().expand(q.shape[0], -1).contiguous()
    scoring = describe(q, k, plain)._replace(diagonal=diagonal)
    scoring = in_segments(scoring, ids.index_select(1, aligned), ids)
    moved = q.index_select(2, of_queries), k.index_select(2, order), v.index_select(2, order)
    return moved, scoring, undo


def documents(k: torch.Tensor, options: Options) -> torch.Tensor:
    """Return small numbers (B, S) that are equal where documents are."""
    shape = k.shape[0], k.shape[2]
    if isinstance(options.segment_ids, torch.Tensor):
        ids = options.segment_ids.contiguous()
        return torch.searchsorted(ids.sort(dim=-1).values, ids)
    if isinstance(options.cu_seqlens, torch.Tensor):
        positions = torch.arange(shape[1], device=k.device)
        return torch.searchsorted(options.cu_seqlens.long(), positions, right=True).expand(shape)
    return torch.zeros(shape, dtype=torch.int64, device=k.device)
