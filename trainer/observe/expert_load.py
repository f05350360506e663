"""How evenly a step spread its tokens over experts, as numbers for the log."""

from collections.abc import Sequence

import torch


def describe_loads(loads: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the largest and smallest share of an expert as a multiple of an equal share, over all
    blocks, and the share of experts that got nothing.

    Args:
        loads: Choices per expert, (E,), for each block with experts; none for other models.
    """
    if not loads:
        return {}
    shares = torch.cat([load * len(load) / load.sum().clamp_min(1) for load in loads])
    return {
        "expert_load_max": float(shares.max()),
        "expert_load_min": float(shares.min()),
        "experts_idle": float((shares == 0).double().mean()),
    }
