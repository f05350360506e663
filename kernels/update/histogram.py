"""Quantiles of magnitudes from a histogram: no sorting, one pass, and shards add up.

A bin holds the magnitudes whose float32 pattern begins with the same 11 bits, exponent and first
three bits of the mantissa: patterns of positive numbers are in the order of the numbers. So bins
are an eighth of a power of two wide, from the smallest number to the largest, whatever the scale of
a gradient, and a quantile is right to within one bin: at most 12.5 % of itself. Counts of several
tensors, ranks or devices are summed to those of all; everyone then finds the same quantile.
"""

import numpy as np
import torch

from interlace.kernels.update.api import as_array

BINS = 2048
"""Bins of a histogram: all patterns of 11 bits."""

SHIFT = 20
"""Bits of a float32 pattern that a bin does not tell apart."""

AT_ONCE = 2**22
"""Elements whose bins are written down together where there is no kernel."""


def magnitude_histogram(values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return how many magnitudes of `values * scale` fall into every bin.

    Zeros and what is not finite are not counted. Products are those of the updates: in float32.

    Args:
        values: 1-D, contiguous, of any floating dtype and on any device; may be empty.
        scale: The gradient scale of the update.

    Returns:
        (`BINS`,) int64, on the same device; nobody has waited for it.
    """
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16):
        from interlace.kernels.update.cpu import magnitudes

        counts = np.zeros(BINS, dtype=np.int64)
        magnitudes(as_array(values), np.float32(scale), counts)
        return torch.from_numpy(counts)
    # One bin more, for what is not counted: nobody has to wait for how many are left.
    total = torch.zeros(BINS + 1, dtype=torch.int64, device=values.device)
    for piece in values.detach().split(AT_ONCE):
        bits = (piece.to(torch.float32) * scale).abs().view(torch.int32)
        counted = (bits > 0) & (bits < 0x7F800000)
        bins = torch.where(counted, bits >> SHIFT, BINS).to(torch.int64)
        total.scatter_add_(0, bins, torch.ones_like(bins))
    return total[:BINS]


def quantile_of(histogram: torch.Tensor, share: float, total: int | None = None) -> float:
    """Return the magnitude that a share of the counted coordinates exceeds.

    Args:
        histogram: (`BINS`,) int64, of `magnitude_histogram`, or a sum of several.
        share: Between 0 and 1.
        total: Coordinates among which the share counts, if more than were counted: the others are
            zeros. By default those that were counted.

    Returns:
        A magnitude inside the right bin, found by linear interpolation; 0.0 where nothing was
        counted, or where the quantile is one of the zeros.
    """
    counts = histogram.cpu().numpy()
    above = share * (int(counts.sum()) if total is None else total)
    # How many lie in each bin or above it.
    reached = np.cumsum(counts[::-1])[::-1]
    if above >= reached[0]:
        return 0.0
    place = int(np.flatnonzero(reached > above)[-1])
    inside = (reached[place] - above) / counts[place]
    low, high = lower_edge(place), lower_edge(place + 1)
    return min(low + inside * (high - low), float(np.finfo(np.float32).max))


def lower_edge(place: int) -> float:
    """Return the smallest number of a bin; for the bin after that of the largest numbers, 2**128
    (which float32 has not).
    """
    exponent, eighths = place >> 3, place & 7
    if exponent == 0:
        return eighths / 8.0 * 2.0**-126
    return (1.0 + eighths / 8.0) * 2.0 ** (exponent - 127)
