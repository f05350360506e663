"""Rules that have no kernels: their formula on slabs of every form, a few passes instead of one.

Everything around the formula is as in the kernels: masters in one piece or in two planes, weights
rounded to nearest even, bfloat16 moments rounded stochastically with the same noise, so that
results do not depend on how slabs are cut. A formula has to work element by element.
"""

from typing import Any

import torch

from interlace.kernels.update.clip import COMPILED, CoordinateClip
from interlace.kernels.update.limit import Count
from interlace.kernels.update.planes import merge_master, split_master
from interlace.kernels.update.rules import UpdateRule
from interlace.kernels.update.slab import Slab, Step, rounding_keys

MASK = 0xFFFFFFFF


def has_kernels(rule: UpdateRule) -> bool:
    """Whether a rule, or the one it clips, is of those that are compiled; a class derived from one
    of them is not.
    """
    return type(rule.rule if isinstance(rule, CoordinateClip) else rule) in COMPILED


def update_plain(rule: UpdateRule, slab: Slab, step: Step, position: int) -> Count:
    """Update a whole slab with the formula, in float64 where the slab is, else in float32; return
    how many coordinates the threshold of the rule cut.

    Args:
        rule: Any rule.
        slab: Of any form and on any device.
        step: The scalars.
        position: What `first_element` is of this slab, for the noise.
    """
    wide = torch.promote_types(slab.master.dtype, torch.float32)
    whole = slab.remainder is None
    master = slab.master if whole else merge_master(slab.master, present(slab.remainder))
    moments = tuple(moment.to(wide) for moment in slab.moments)
    gradient = slab.gradient.to(wide) * step.gradient_scale
    count: Count = 0
    if isinstance(rule, CoordinateClip):
        count = rule.plain_counted(master, gradient, moments, step.number, step.hyper)
    else:
        rule.plain(master, gradient, moments, step.number, step.hyper)
    if slab.remainder is not None:
        high, low = split_master(master)
        slab.master.copy_(high)
        slab.remainder.copy_(low)
    if slab.weight is not None:
        slab.weight.copy_(master)
    keys = rounding_keys(rule, step)
    for moment, value, key in zip(slab.moments, moments, keys, strict=True):
        if moment.dtype is torch.bfloat16:
            moment.copy_(rounded(value, position, int(key)))
    return count


def present(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor that is known to be there."""
    assert tensor is not None, "a split master has a remainder"
    return tensor


def rounded(value: torch.Tensor, position: int, key: int) -> torch.Tensor:
    """Return float32 numbers (n,) as bfloat16, rounded up with the probability of what is rounded
    off.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64) & MASK
    finite: Any = (bits & 0x7F800000) != 0x7F800000
    places = torch.arange(position, position + value.numel(), device=value.device) & MASK
    high = (bits + finite * (noise(places, key) & 0xFFFF)) >> 16
    # Numbers from 2**15 on are the negative ones of 16 bits.
    return (high - ((high & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)


def noise(places: torch.Tensor, key: int) -> torch.Tensor:
    """Return 32 well-mixed bits per position (n,) int64 (MurmurHash3's finaliser, Appleby 2011)."""
    x = places ^ key
    x = x ^ (x >> 16)
    # Products wrap around; their low 32 bits are right all the same.
    x = (x * 0x85EBCA6B) & MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)
