"""The randomness of a descent: every row draws from generators of its own, named by a key.

The key says which row of which step it is, so what is drawn does not depend on how rows are spread
over ranks and passes, nor on what was drawn before: a run that is resumed draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.models.initial import generator_of


@dataclass(frozen=True)
class Draws:
    """What is drawn for one micro-batch, on demand.

    Attributes:
        settings: How much of what.
        keys: One for each row, replayed ones last.
        landscapes: Number of the landscape of every step.
        device: Where numbers are drawn.
        spread: Whether step sizes are drawn for every position.
        starts: Logits that the last rows start from instead, (R, T, V) fp32, or None.
    """

    settings: EnergySection
    keys: Sequence[str]
    landscapes: Sequence[int]
    device: torch.device
    spread: bool = False
    starts: torch.Tensor | None = field(default=None)

    def start(self, length: int, entries: int) -> torch.Tensor:
        """Return the logits that descents start from, (B, T, V) fp32."""
        replayed = 0 if self.starts is None else len(self.starts)
        keys = self.keys[: len(self.keys) - replayed]
        fresh = self.settings.start_scale * self.normal("start", keys, length, entries)
        return fresh if self.starts is None else torch.cat([fresh, self.starts.to(self.device)])

    def noise(self, number: int, length: int, entries: int) -> torch.Tensor | None:
        """Return what is added to the candidates before a step, (B, T, V) fp32, or None."""
        if not self.settings.langevin_noise:
            return None
        drawn = self.normal(f"noise {number}", self.keys, length, entries)
        return self.settings.langevin_noise * drawn

    def rates(self, step_size: torch.Tensor, length: int) -> torch.Tensor:
        """Return the step size of every position, (B, T, 1) or (1, 1, 1), in fp32 at least.

        Args:
            step_size: (1,), of any floating dtype.
            length: T.
        """
        wide = step_size.to(torch.promote_types(step_size.dtype, torch.float32))
        bounded = wide.clamp(min=self.settings.step_size_floor).view(1, 1, 1)
        widest = self.settings.step_size_spread
        if not self.spread or widest == 1.0:
            return bounded
        generators = [generator_of(f"{key}/rates", self.device) for key in self.keys]
        drawn = [torch.rand(length, 1, generator=g, device=self.device) for g in generators]
        return bounded * (1 / widest + torch.stack(drawn) * (widest - 1 / widest))

    def normal(self, what: str, keys: Sequence[str], *shape: int) -> torch.Tensor:
        """Return standard normal numbers, (rows, *shape) fp32."""
        generators = [generator_of(f"{key}/{what}", self.device) for key in keys]
        rows = [torch.randn(shape, generator=g, device=self.device) for g in generators]
        return torch.stack(rows)


def landscapes_of(settings: EnergySection, last_steps: int) -> list[int]:
    """Return the landscape of every step, the last of them `last_steps` times."""
    return [*range(settings.steps - 1), *[settings.steps - 1] * last_steps]


def replaying_rows(settings: EnergySection, rows: int) -> list[int]:
    """Return the numbers of those of a step's rows that come with a replayed row, evenly spread."""
    if not settings.replay_rows:
        return []
    # Rounded: 49 times the float nearest to 1/49 is less than one.
    due = [int(round(row * settings.replay_share, 6)) for row in range(rows + 1)]
    return [row for row in range(rows) if due[row + 1] > due[row]]
