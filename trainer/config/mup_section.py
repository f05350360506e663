"""The `[mup]` table: hyperparameters that stay right when the model grows.

Under the maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466) initial values,
learning rates and a few multipliers of every tensor follow the width, so that the best learning
rate of a narrow model is the best of a wide one. At `base_width` everything is as without it.
"""

from typing import Literal

from interlace.trainer.config.section import PositiveInt, Section

Rule = Literal[
    "hidden_lr",
    "vector_lr",
    "readout_multiplier",
    "router",
    "row_blocks",
    "threshold",
    "weight_decay",
    "epsilon",
    "attention_scale",
]
"""The rules that can be left out, to see what each is for."""


class MupSection(Section):
    """How initial values, multipliers and rates follow the width (arXiv 2203.03466)."""

    enabled: bool = False
    """Let initial values, learning rates and multipliers follow the width, from `base_width`."""

    base_width: PositiveInt | None = None
    """Width at which all multipliers are one: that of the model whose settings are carried over."""

    base_layers: PositiveInt | None = None
    """Let them follow the depth as well, from so many `model.layers` (CompleteP, arXiv
    2505.01618); unset leaves depth alone.
    """

    grows: Literal["heads", "head_width"] = "heads"
    """What of attention grows with the width: the number of heads, or the width of each, with
    scores divided by it rather than by its root.
    """

    zero_readout: bool = False
    """Start output matrices (head, router, energy) at zero."""

    zero_query: bool = False
    """Start the query projections of attention at zero."""

    without: list[Rule] = []
    """Rules left out, to see what they are for; `interlace mup check` must fail then."""
