"""Rotary position embedding in the half-split layout (Su et al. 2021, arXiv 2104.09864; as in
Llama).

torch's operations, turned in fp32 at least; differentiable to any order. On a GPU they are compiled
together with their neighbours (benchmarks/step_ops.py measures what that is worth).
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

    Raises:
        TypeError: Positions are not integers.
        ValueError: Positions are not (B, T), or the head width is odd.
    """
    if positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"rotary_tables: positions must be integers; got {positions.dtype}")
    if positions.ndim != 2 or head_width % 2 or head_width < 2:
        raise ValueError(
            "rotary_tables takes positions (B, T) and an even head width; got "
            f"{list(positions.shape)} and head_width={head_width}"
        )
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-exponents / head_width)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (j, j + K/2) of queries or keys by their position's angles.

    Args:
        x: (B, H, T, K), any floating dtype; turned in fp32 at least.
        cosine: (B or 1, 1, T, K), any floating dtype.
        sine: As `cosine`.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        TypeError: `x` is not floating.
        ValueError: The tables do not fit `x`.
    """
    if not x.is_floating_point():
        raise TypeError(f"apply_rotary: x must be floating; got {x.dtype}")
    fitting = [(x.shape[0], 1, *x.shape[2:]), (1, 1, *x.shape[2:])] if x.ndim == 4 else []
    if cosine.shape not in fitting or sine.shape != cosine.shape or x.shape[-1] % 2:
        raise ValueError(
            "apply_rotary takes x (B, H, T, K) with K even, cosine and sine (B or 1, 1, T, K); "
            f"got {list(x.shape)}, {list(cosine.shape)} and {list(sine.shape)}"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    # Narrow tables are promoted inside the products; a cast would leave a copy for backward.
    return (wide * cosine + turned * sine).to(x.dtype)


def apply_rotary_reference(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """The plain twin of `apply_rotary`: pair by pair, in the input's own precision."""
    half = x.shape[-1] // 2
    (a, b), cosine, sine = (x[..., :half], x[..., half:]), cosine[..., :half], sine[..., :half]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
