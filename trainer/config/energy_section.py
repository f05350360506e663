"""The `[energy]` table: how the `energy` objective descends, and what of the descent is trained on.

Energy-Based Transformers (Gladstone et al. 2025, arXiv 2507.02092) are published with two recipes,
called S1 (scaling runs) and S2 (thinking runs) here. S1 is the default of every setting. S2 is

    [energy]
    steps = 1
    fewest_last_steps = 2
    most_last_steps = 3
    step_size = 5.0
    learn_step_size = false
    step_size_spread = 2.0
    langevin_noise = 3.0
    detach = false
    loss_steps = "last"
    truncate = true
    replay_rows = 192
"""

from typing import Annotated, Literal

from pydantic import Field

from interlace.trainer.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class EnergySection(Section):
    """Predictions by descent on a learnt energy (arXiv 2507.02092)."""

    steps: PositiveInt = 2
    """Energy landscapes, a step embedding each, that a candidate descends one after another."""

    fewest_last_steps: PositiveInt = 1
    """Fewest steps on the last landscape; every training step draws a number from here to
    `most_last_steps`.
    """

    most_last_steps: PositiveInt = 1
    """Most steps on the last landscape; validation and sampling take so many."""

    step_size: PositiveFloat = 500.0
    """Factor on the energy's gradient in a step of descent; where it is learnt, its start."""

    learn_step_size: bool = True
    """Train the step size together with the weights, without decay."""

    step_size_lr_factor: PositiveFloat = 1500.0
    """Learning rate of a learnt step size as a multiple of the weights'; three times `step_size` is
    the published rule.
    """

    step_size_floor: PositiveFloat = 1e-4
    """A learnt step size that falls below this counts as this."""

    step_size_spread: Annotated[float, Field(ge=1.0)] = 1.0
    """In training the step size of every position is drawn evenly between `step_size` divided and
    multiplied by this; 1 draws nothing.
    """

    langevin_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise that is added to the candidates before every step, in
    training and validation; 0 adds none.
    """

    start_scale: NonNegativeFloat = 1.0
    """Standard deviation of the random logits that a descent starts from."""

    update_base: Literal["probabilities", "logits"] = "probabilities"
    """What a step subtracts the gradient from: the candidate's probabilities, whose softmax
    overwrites the logits (as published), or the logits, descended by their own gradient.
    """

    detach: bool = True
    """Train every step by itself: no gradient goes from a step back into the one before."""

    loss_steps: Literal["every", "last"] = "every"
    """Whose prediction is trained: the mean over every step, or the last step's alone."""

    truncate: bool = False
    """Differentiate the last step only; those before it are constants."""

    replay_rows: NonNegativeInt = 0
    """Rows of earlier steps that are kept, on the host, with the candidates they ended with; 0
    replays nothing. A row takes 4 bytes for every position and vocabulary entry.
    """

    replay_share: Fraction = 0.5
    """Share of a training step's rows that come with a replayed row, which goes on where it ended.
    """

    variant: Literal["none", "time_embed", "adaln"] = "time_embed"
    """How candidates are told the step: not at all, by an embedding that is added to their input,
    or by scales, shifts and gates in every block (adaLN-zero, arXiv 2212.09748).
    """

    candidate_table: Literal["own", "tokens"] = "own"
    """What turns a candidate's probabilities into an input: a table of its own, or the token
    embeddings.
    """

    inner_step: Literal["graph_free", "plain"] = "graph_free"
    """How a step of descent is differentiated: a dual-number pass in backward, which keeps the
    candidate alone, or torch's double backward, which keeps a graph of every step and takes a
    quarter less arithmetic.
    """
