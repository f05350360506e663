"""How weights start: gains are one, matrices normal with a spread that keeps activations near
one.
"""

import hashlib
import math

import torch

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.depth import layer_patterns

EMBEDDING_DEVIATION = 0.02


def generator_of(key: str, device: torch.device) -> torch.Generator:
    """Return a generator whose numbers are a function of the key."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def embedding_value(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return an embedding or head (V, D), fp32: normal with standard deviation 0.02 (GPT-2)."""
    return torch.normal(0.0, EMBEDDING_DEVIATION, shape, generator=generator)


def matrix_value(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a matrix (..., out, in), fp32: normal with standard deviation 1 / sqrt(in)."""
    return torch.normal(0.0, 1.0 / math.sqrt(shape[-1]), shape, generator=generator)


def residual_matrix_value(
    shape: tuple[int, ...], config: ModelSection, generator: torch.Generator
) -> torch.Tensor:
    """Return a matrix (..., out, in) that writes into the residual stream, fp32.

    Its deviation is divided by the root of the number of blocks, so that the stream's variance does
    not grow with depth (Radford et al. 2019, GPT-2, section 2.3).
    """
    blocks = len("".join(layer_patterns(config)))
    deviation = 1.0 / math.sqrt(shape[-1]) / math.sqrt(blocks)
    return torch.normal(0.0, deviation, shape, generator=generator)
