"""How the weights start that only an energy model has."""

import torch

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.models.initial import embedding_value, generator_of, matrix_value


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, settings: EnergySection
) -> torch.Tensor | None:
    """Return the whole initial value of a parameter or buffer, fp32 on the CPU, or None if it is
    not one of these.

    The candidates' table has an entry's spread as a token table does. Step embeddings that are
    added to candidates start at zero, so that candidates, which are short while they are nearly
    even, are not drowned by them. adaLN's matrices start at zero too, which leaves every block out
    at first; the embeddings that they read must not, or neither would ever have a gradient.
    """
    generator = generator_of(f"{seed}/{name}", torch.device("cpu"))
    if name == "step_size":
        return torch.full(shape, settings.step_size)
    if name == "candidate_proj.weight":
        return embedding_value(shape, generator)
    if name == "energy_head.weight":
        return matrix_value(shape, generator)
    if name == "step_embed.weight" and settings.variant == "adaln":
        return torch.randn(shape, generator=generator)
    if name == "step_embed.weight" or name.startswith("modulations."):
        return torch.zeros(shape)
    return None
