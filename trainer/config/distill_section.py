"""The `[distill]` table: whom the `distill` objective learns from, and what counts how much."""

from typing import Literal

from interlace.trainer.config.section import NonNegativeFloat, PositiveFloat, Section


class DistillSection(Section):
    """Distillation into a model whose layers were partly replaced (MaTVLM, arXiv 2503.13440)."""

    teacher: str = ""
    """Run folder, model folder or Hugging Face folder of the teacher, which stays as it is."""

    hidden_weight: NonNegativeFloat = 1.0
    """Weight of the distance between each replaced layer's output and the teacher's, both given the
    teacher's input; 0 turns it off.
    """

    logit_weight: NonNegativeFloat = 1.0
    """Weight of the divergence of the predictions from the teacher's; 0 turns it off."""

    likelihood_weight: NonNegativeFloat = 0.0
    """Weight of the likelihood of the text itself."""

    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the divergence, which is then multiplied by its square."""

    train_only: Literal["new", "all"] = "new"
    """Train what the teacher does not have, the mixers that replaced others, or everything."""

    reduction: Literal["mean", "sum"] = "mean"
    """`mean` over tokens, channels and layers, whatever the batch; `sum` as in the paper: norms of
    whole micro-batches, divergences summed over the positions of a row.
    """
