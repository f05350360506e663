"""What an update works on: the tensors of one slab, and the scalars of one step."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from interlace.kernels.update.rules import UpdateRule


@dataclass(frozen=True)
class Slab:
    """1-D contiguous tensors of n elements each, all on one device.

    Attributes:
        gradient: float32 or bfloat16.
        master: float32, updated in place; with a `remainder` the bfloat16 high plane.
        moments: One per moment of the rule, float32, or bfloat16 with stochastic rounding.
        weight: Receives the new weight, rounded to nearest even (bfloat16) or as it is (float32);
            None where the master is the weight.
        remainder: int16 low plane of a split master (see `planes`), or None.

    In float64 all tensors are float64 and there is no remainder; the plain twin computes.
    """

    gradient: torch.Tensor
    master: torch.Tensor
    moments: tuple[torch.Tensor, ...]
    weight: torch.Tensor | None = None
    remainder: torch.Tensor | None = None


@dataclass(frozen=True)
class Step:
    """The scalars of one update.

    Attributes:
        number: Which update of these elements this is, from 1.
        gradient_scale: Gradients are multiplied by this first: unscaling and clipping in one.
        hyper: Values of the parameter group: `lr` and what else the rule reads.
        rounding_seed: Seed of stochastic rounding.
        first_element: Position of element 0 in what the seed counts over, so that rounding does not
            depend on how slabs are cut.
    """

    number: int
    gradient_scale: float
    hyper: Mapping[str, object]
    rounding_seed: int = 0
    first_element: int = 0


def rounding_keys(rule: UpdateRule, step: Step) -> tuple[np.uint32, ...]:
    """Return one 32-bit key per moment, different for every seed, update and moment."""
    return keys_of(step.rounding_seed, step.number, len(rule.moments))


@lru_cache(maxsize=256)
def keys_of(seed: int, number: int, count: int) -> tuple[np.uint32, ...]:
    """Return the keys of one update; all slabs of a step ask for the same."""
    keys = np.random.SeedSequence([seed, number]).generate_state(count, np.uint32)
    return tuple(np.uint32(key) for key in keys)
