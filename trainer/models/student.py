"""A language model that learns from another one's insides (MaTVLM, arXiv 2503.13440, section 3.3).

Some of its layers took the place of a teacher's. Each of those is given what the teacher's layer
was given and shall return what that returned; the predictions at the end shall be the teacher's.
Both streams, the student's own and the teacher's inputs, pass through a replaced layer as one batch
of twice the rows: its weights are gathered and their gradients delivered once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from interlace.trainer.config.distill_section import DistillSection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.distilled_head import HeadInputs, HeadWeights, distilled_head
from interlace.trainer.models.language_model import LanguageLoss, LanguageModel, Routing


@dataclass(frozen=True)
class Lesson:
    """What a teacher makes of a micro-batch, in the compute dtype and without a graph.

    Attributes:
        layers: For each replaced layer its input and output, (B, T, D), by the layer's number.
        hidden: The normed output of the stack, (B, T, D).
        head: The output matrix, (V, D).
    """

    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor
    head: torch.Tensor


def replaced_layers(student: ModelSection, teacher: ModelSection) -> dict[int, tuple[int, ...]]:
    """Return the layers whose words differ, and the places of the blocks that do.

    Raises:
        ValueError: The stacks are not layer for layer, block for block comparable.
    """
    ours, theirs = layer_patterns(student), layer_patterns(teacher)
    if [len(word) for word in ours] != [len(word) for word in theirs]:
        raise ValueError(f"its layers are {' '.join(theirs)}, and this recipe's {' '.join(ours)}")
    return {
        number: tuple(place for place in range(len(mine)) if mine[place] != other[place])
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True))
        if mine != other
    }


@torch.no_grad()
def teach(
    teacher: LanguageModel,
    tokens: torch.Tensor,
    segments: torch.Tensor | None,
    positions: torch.Tensor | None,
    layers: Sequence[int],
) -> Lesson:
    """Run a teacher over (B, T) tokens and keep what passes through the named layers."""
    x, context = teacher.entrance(tokens, segments, positions)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, layer in enumerate(teacher.layers):
        given = x
        x, _ = layer(given, context)
        if number in layers:
            kept[number] = (given, x)
    return Lesson(kept, teacher.norm(x), teacher.head_weight())


class Student(LanguageModel):
    """A language model whose loss, given a lesson, is how far it is from its teacher."""

    def __init__(
        self,
        config: ModelSection,
        vocabulary_size: int,
        compute_dtype: torch.dtype = torch.float32,
        settings: DistillSection | None = None,
    ) -> None:
        super().__init__(config, vocabulary_size, compute_dtype)
        self.settings = settings or DistillSection()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        segments: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        z_loss: float = 0.0,
        lesson: Lesson | None = None,
    ) -> LanguageLoss:
        """Return the distance from the teacher, or without a lesson the loss of predicting
        `targets`; arguments are those of `LanguageModel.forward`.
        """
        if lesson is None:
            return super().forward(
                tokens, targets, segments=segments, positions=positions, z_loss=z_loss
            )
        settings = self.settings
        hidden, distances, routings = self.pass_beside(lesson, tokens, segments, positions)
        count, rows = targets.numel(), targets.shape[0]
        averaged = count if settings.reduction == "mean" else rows
        inputs = HeadInputs(
            hidden.flatten(0, 1),
            self.head_weight(),
            lesson.hidden.flatten(0, 1),
            lesson.head,
            targets.flatten(),
        )
        weights = HeadWeights(
            divergence=settings.logit_weight / averaged,
            likelihood=settings.likelihood_weight / count,
            temperature=settings.temperature,
        )
        losses = distilled_head(inputs, weights)
        objective, details = losses.objective, {"divergence": losses.divergence / averaged}
        if distances:
            distance = torch.stack(distances).sum()
            if settings.reduction == "mean":
                distance = distance / len(distances)
            objective = objective + settings.hidden_weight * distance
            details["distance"] = distance.detach().clone()
        for routing in routings:
            objective = objective + routing.loss
        loads = [routing.load for routing in routings]
        return LanguageLoss(objective, losses.nll / count, loads, details)

    def pass_beside(
        self,
        lesson: Lesson,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[Routing]]:
        """Return the normed output of the stack, the distance of every replaced layer, and what
        blocks with experts report; those in replaced layers report of both streams.
        """
        settings = self.settings
        x, context = self.entrance(tokens, segments, positions)
        both = doubled(context)
        # Where nothing is learnt from its own stream, nothing need be differentiated there.
        speaks = bool(settings.logit_weight or settings.likelihood_weight)
        distances: list[torch.Tensor] = []
        routings: list[Routing] = []
        for number, layer in enumerate(self.layers):
            x = x if speaks else x.detach()
            if number in lesson.layers and settings.hidden_weight:
                given, wanted = lesson.layers[number]
                passed, found = layer(torch.cat([x, given]), both)
                x, answer = cast(torch.Tensor, passed).chunk(2)
                distances.append(distance_between(answer, wanted, settings.reduction))
            else:
                x, found = layer(x, context)
            routings += found
        return self.norm(x if speaks else x.detach()), distances, routings


def doubled(context: BlockContext) -> BlockContext:
    """Return the context of a batch that holds every row twice, one half after the other."""
    rotary, segments = context.rotary, context.segments
    if segments is not None:
        segments = torch.cat([segments, segments])
    if rotary is not None and rotary[0].shape[0] > 1:
        rotary = (torch.cat([rotary[0], rotary[0]]), torch.cat([rotary[1], rotary[1]]))
    return replace(context, rotary=rotary, segments=segments)


def distance_between(found: torch.Tensor, wanted: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return how far two (B, T, D) outputs are apart, a scalar in fp32 at least.

    With `mean` the root mean square over the channels of each token, averaged over the tokens: it
    does not depend on how rows are cut into micro-batches. With `sum` the norm of the whole
    difference, as in the paper.
    """
    difference = (found - wanted).to(torch.promote_types(found.dtype, torch.float32))
    if reduction == "sum":
        return torch.linalg.vector_norm(difference)
    return torch.linalg.vector_norm(difference, dim=-1).mean() / difference.shape[-1] ** 0.5
