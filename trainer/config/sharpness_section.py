"""The `[sharpness]` table: how curved the loss is along the steps that update rules would take.

Pan and Li 2023 (arXiv 2306.00204) explain with it why Adam outruns gradient descent on
Transformers: along Adam's step the loss bends less. `observe.diagnostics` turns a measurement on;
nothing here changes what is trained.
"""

from typing import Annotated

from pydantic import Field

from interlace.trainer.config.section import NonNegativeInt, PositiveInt, Section


class SharpnessSection(Section):
    """When and along what `directional_sharpness` and `critical_sharpness` measure."""

    rules: Annotated[list[str], Field(min_length=1)] = ["sgd", "clipped_sgd", "adamw"]
    """Update rules whose directions `directional_sharpness` compares on the run's own trajectory;
    each with the recipe's `[optimizer]` and `[coordinate_clip]` tables, and moments of its own.
    """

    steps: list[PositiveInt] = [10, 20]
    """Steps that are measured, from 1; rules differ most early in training."""

    every_steps: NonNegativeInt = 100
    """Steps between further measurements; 0 leaves it at `steps`."""

    rows: PositiveInt = 8
    """Rows of the step's own batch that are measured, the first ones; all of them if it has
    fewer.
    """

    def is_due(self, step: int) -> bool:
        """Whether a step, from 1, is measured."""
        return step in self.steps or (self.every_steps > 0 and step % self.every_steps == 0)
