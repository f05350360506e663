"""The rules of muP: what the growth of a tensor's two sides means for its start and its rates.

Maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466, table 8), in the form in which
output matrices keep their spread and the numbers behind them are divided by the width. With m the
growth of the fan-in or fan-out from the base width:

| role | spread at the start | Adam's rate | scale s of the gradient | multiplier |
|---|---|---|---|---|
| input (embedding, gains, taps) | 1 | 1 | 1 / m_out | |
| hidden | 1 / sqrt(m_in) | 1 / m_in | 1 / m_out | |
| readout (head, router, energy) | 1 | 1 | 1 / m_in | 1 / m_in |
| readout without a multiplier | 1 / m_in | 1 / m_in | 1 | |
| finite | 1 | 1 | 1 | |

An update that is proportional to the gradient needs Adam's rate divided by s: the published rates
of SGD. Epsilon, which is compared with a gradient, follows s. So does the threshold of a clipped
coordinate: that is derived here, not published. The update of gradient descent with rate r / s,
clipped at c s, is that of rate r and threshold c on the gradient divided by s, which does not
depend on the width; without the rule a wide model is never clipped. Weight decay is divided by the
rate's factor, so that what a step takes off does not depend on the width (arXiv 2510.19093).

With the depth (CompleteP, Dey et al. 2025, arXiv 2505.01618, alpha = 1) every block's output is
divided by its growth L, and with it the gradient in the block.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from interlace.trainer.config.mup_section import Rule

Part = Literal["input", "hidden", "readout", "finite"]
"""Role of a tensor or of a block of its rows, from which of its sides grow."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much wider a tensor is than at the base width.

    Attributes:
        part: Which sides grow at all.
        fan_in: Growth of the input side; 1 where it does not grow.
        fan_out: Growth of the output side; 1 where it does not grow.
        depth: Growth of the number of layers, for what is inside a block.
        divided: A readout whose results a module divides by the width.
        spread_falls: Its start falls with the root of the fan-in by itself, as `matrix_value` does.
    """

    part: Part
    fan_in: float = 1.0
    fan_out: float = 1.0
    depth: float = 1.0
    divided: bool = False
    spread_falls: bool = True


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Multiples of what a tensor has at the base width.

    Attributes:
        initial: Of the initial values that the recipe alone would give it at this width.
        lr: Of the learning rate.
        weight_decay: Of the weight decay.
        eps: Of Adam's epsilon.
        threshold: Of the threshold of a clipped coordinate.
    """

    initial: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    threshold: float = 1.0


def factors(growth: Growth, scale_free: bool, without: Collection[Rule] = ()) -> Factors:
    """Return what follows for one tensor or block of rows.

    Args:
        growth: Its growth.
        scale_free: Whether the update rule does not depend on the gradient's scale, as Adam's.
        without: Rules that are left out.
    """
    rate = 1.0 if "hidden_lr" in without and growth.part == "hidden" else adam_rate(growth)
    scale = gradient_scale(growth)
    unscaled = scale_free or ("vector_lr" in without and growth.part in {"input", "readout"})
    lr = rate if unscaled else rate / scale
    return Factors(
        initial=initial_factor(growth),
        lr=lr,
        weight_decay=1.0 if "weight_decay" in without else 1.0 / lr,
        eps=1.0 if "epsilon" in without else scale,
        threshold=1.0 if "threshold" in without else scale,
    )


def adam_rate(growth: Growth) -> float:
    """Return the factor on Adam's learning rate."""
    narrows = growth.part == "hidden" or (growth.part == "readout" and not growth.divided)
    return 1.0 / growth.fan_in if narrows else 1.0


def gradient_scale(growth: Growth) -> float:
    """Return how the gradient's coordinates shrink."""
    match growth.part:
        case "hidden" | "input":
            scale = 1.0 / growth.fan_out
        case "readout":
            scale = 1.0 / growth.fan_in if growth.divided else 1.0
        case "finite":
            scale = 1.0
    return scale / growth.depth


def initial_factor(growth: Growth) -> float:
    """Return the factor on the initial values of the recipe alone."""
    if growth.part != "readout":
        return 1.0
    if growth.divided:
        return growth.fan_in**0.5 if growth.spread_falls else 1.0
    return growth.fan_in**-0.5 if growth.spread_falls else 1.0 / growth.fan_in
