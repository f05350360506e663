"""Rotary position embedding in the half-split layout (Su et al. 2021, arXiv 2104.09864; as in
Llama).
"""

import torch


def rotary_tables(
    positions: torch.Tensor, head_width: int, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of every position's angles.

    Args:
        positions: (B, T) integers.
        head_width: K, even.
        base: Base of the wavelengths; pair `j` turns by `base ** (-2 j / K)` per position.

    Returns:
        Two tensors (B, 1, T, K) in fp32, broadcast over heads.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-exponents / head_width)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (j, j + K/2) of queries or keys `x` (B, H, T, K) by their position's
    angles.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cosine.to(x.dtype) + turned * sine.to(x.dtype)
