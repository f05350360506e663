"""Placeholder of the seam until the kernels' own file is here: overwrite it."""

import torch

BINS = 2048


def magnitude_histogram(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return counts of non-zero finite magnitudes by the top bits of their float32 pattern."""
    scaled = (values.float() * scale).abs()
    kept = scaled[torch.isfinite(scaled) & (scaled > 0)]
    return torch.bincount((kept.view(torch.int32) >> 20).long(), minlength=BINS)


def quantile_of(histogram: torch.Tensor, share: float, total: int | None = None) -> float:
    """Return the magnitude that a share of the counted coordinates exceeds."""
    counted = int(histogram.sum())
    above = share * (counted if total is None else total)
    if not counted:
        return 0.0
    edges = (torch.arange(BINS + 1, dtype=torch.int32) << 20).view(torch.float32)
    reached = 0
    for number in range(BINS - 1, -1, -1):
        count = int(histogram[number])
        if count and reached + count >= above:
            low, high = float(edges[number]), float(edges[number + 1])
            return high - (high - low) * (above - reached) / count
        reached += count
    return 0.0
