"""Objective `distill`: a model whose layers were partly replaced learns from what it was made of.

The recipe of MaTVLM (arXiv 2503.13440): replaced layers imitate the teacher's, given the teacher's
inputs, and predictions imitate the teacher's; by default only what is new is trained. The losses
are in `interlace.trainer.models.student`.

The teacher has the compute dtype, is whole on every rank and is not compiled. It is not part of
checkpoints, which hold a digest of its weights instead, so that a run does not go on under another
teacher unnoticed.
"""

import hashlib
from collections.abc import Mapping
from typing import cast

import torch

from interlace.trainer.batches import Batch
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import CheckpointError, ConfigError, UserError
from interlace.trainer.models import cost
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.language_model import LanguageLoss, LanguageModel
from interlace.trainer.models.model import Model
from interlace.trainer.models.registry import Flops, mixer_class
from interlace.trainer.models.student import Student, replaced_layers, teach
from interlace.trainer.objectives import Loss, objective
from interlace.trainer.objectives.next_token import predictions
from interlace.trainer.parallel import cast_weights, compute_dtype_of
from interlace.trainer.plan import Plan
from interlace.trainer.saved_model import (
    load_saved_model,
    saved_config,
    without_multipliers,
)
from interlace.trainer.starting_weights import folder_named
from interlace.trainer.world import World


@objective("distill")
class Distill:
    """Distance from a teacher, layer by layer and in the predictions."""

    compiles = True

    def __init__(self, config: RunConfig, plan: Plan, world: World) -> None:
        self.settings = config.distill
        self.replaced = replaced_in(config)
        folder = folder_named("distill.teacher", config.distill.teacher)
        saved = without_multipliers(load_saved_model(folder))
        assert isinstance(saved.model, LanguageModel), "checked by `problems`"
        rows = saved.model.embedding.weight.shape[0]
        if rows != plan.vocabulary_size:
            raise ConfigError(
                [
                    f"distill.teacher={config.distill.teacher}: knows {rows} tokens, and "
                    f"data.tokenizer={config.data.tokenizer} has {plan.vocabulary_size}; type "
                    f"data.tokenizer={folder.absolute()}/tokenizer.json"
                ]
            )
        self.digest = digest_of(saved.model)
        dtype = compute_dtype_of(config.train, world.device.type)
        self.teacher = saved.model.to(world.device).requires_grad_(False)
        self.teacher.compute_dtype = dtype
        cast_weights(self.teacher, dtype)

    @classmethod
    def problems(cls, config: RunConfig) -> list[str]:
        """Return what is wrong with the teacher, and settings that nothing comes of."""
        settings = config.distill
        if not settings.teacher:
            return ["distill.teacher is not set: there is nobody to learn from; type its folder"]
        problems: list[str] = []
        if config.train.z_loss:
            problems.append(
                f"train.z_loss={config.train.z_loss}: the distill objective has none; type "
                "train.z_loss=0"
            )
        if settings.train_only == "new" and not config.run.start_from:
            problems.append(
                "distill.train_only=new: leaves what the teacher has too as it starts, which "
                "without run.start_from is at random; type run.start_from= and the folder that "
                "`interlace hybridize` made, or distill.train_only=all"
            )
        if not (settings.hidden_weight or settings.logit_weight or settings.likelihood_weight):
            problems.append(
                "distill.hidden_weight=0: and all other weights are 0, so nothing would be learnt; "
                "type distill.hidden_weight=1"
            )
        try:
            return problems + comparison_problems(config)
        except UserError as error:
            return [*problems, f"distill.teacher={settings.teacher}: cannot be read: {error}"]

    @classmethod
    def build(cls, config: RunConfig, vocabulary_size: int, dtype: torch.dtype) -> Student:
        """Return the student, without values."""
        return Student(config.model, vocabulary_size, dtype, config.distill)

    def freeze(self, model: Model) -> None:
        """Leave what the teacher has too as it is, unless all is to be trained."""
        if self.settings.train_only == "all":
            return
        new = tuple(
            f"layers.{layer}.blocks.{block}.mixer."
            for layer, blocks in self.replaced.items()
            for block in blocks
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(new))

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the distance from the teacher over one micro-batch."""
        lesson = teach(
            self.teacher, batch.tokens, batch.segments, batch.positions, tuple(self.replaced)
        )
        found: LanguageLoss = model(
            batch.tokens,
            batch.targets,
            segments=batch.segments,
            positions=batch.positions,
            lesson=lesson,
        )
        return Loss(found.objective, found.mean_nll, found.expert_loads, found.details)

    def held_out_nll(self, model: Model, batch: Batch) -> torch.Tensor:
        """Return the likelihood of the text alone, without the teacher."""
        return predictions(model, batch).mean_nll

    def state(self) -> dict[str, torch.Tensor]:
        """Return the digest of the teacher."""
        return {"teacher": self.digest.clone()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make sure that it is the same teacher.

        Raises:
            CheckpointError: It is another one.
        """
        if not torch.equal(tensors["teacher"], self.digest):
            raise CheckpointError(
                f"distill.teacher={self.settings.teacher}: its weights are not those this run was "
                "started with; restore them, or start a new run"
            )

    @classmethod
    def parameter_count(cls, config: RunConfig, vocabulary_size: int) -> int:
        """Return the parameters that are trained."""
        if config.distill.train_only == "all":
            return cost.parameter_count(config.model, vocabulary_size)
        words = layer_patterns(config.model)
        return sum(
            mixer_class(words[layer][block]).parameter_count(config.model)
            for layer, blocks in replaced_in(config).items()
            for block in blocks
        )

    @classmethod
    def flops_per_token(cls, config: RunConfig, vocabulary_size: int) -> Flops:
        """Return the student's passes, twice through replaced layers, and the teacher's forward."""
        length, replaced = config.data.sequence_length, replaced_in(config)
        teacher = cost.flops_per_token(teacher_of(config).model, vocabulary_size, length)
        head = 2 * config.model.width * vocabulary_size
        trains_all = config.distill.train_only == "all"
        total = Flops(teacher.forward + head, 2 * head if trains_all else head)
        first = 0 if trains_all else min(replaced, default=0)
        for layer, word in enumerate(layer_patterns(config.model)):
            passes = 2 if layer in replaced and config.distill.hidden_weight else 1
            for block, letter in enumerate(word):
                each = mixer_class(letter).flops_per_token(config.model, length)
                trained = trains_all or block in replaced.get(layer, ())
                # A frozen block's weights need no gradients, and before the first that is trained
                # nothing does.
                saved = 0 if trained else 2 * mixer_class(letter).parameter_count(config.model)
                backward = each.backward - saved if layer >= first else 0
                total += Flops(each.forward, backward).times(passes)
        return total

    @classmethod
    def activation_bytes(
        cls, config: RunConfig, vocabulary_size: int, forward: cost.ForwardPass
    ) -> int:
        """Return what one pass keeps: the student's share as if all of it were trained, the second
        stream of replaced layers, and the teacher's inputs, outputs and logits.
        """
        model, replaced = config.model, replaced_in(config)
        words = layer_patterns(model)
        again = replaced if config.distill.hidden_weight else {}
        second = sum(stream_bytes(config, words[layer], forward) for layer in again)
        lesson = (2 * len(replaced) + 1) * model.width * forward.bytes_per_element
        return (
            cost.activation_bytes(model, vocabulary_size, forward)
            + forward.tokens * (second + lesson)
            + 3 * cost.logits_bytes(vocabulary_size, forward)
        )

    @classmethod
    def untrained_bytes(
        cls, config: RunConfig, vocabulary_size: int, shards: int, bytes_per_element: int
    ) -> int:
        """Return the teacher, whole, and this rank's share of what is frozen."""
        teacher = cost.parameter_count(teacher_of(config).model, vocabulary_size)
        student = cost.parameter_count(config.model, vocabulary_size)
        frozen = student - cls.parameter_count(config, vocabulary_size)
        return bytes_per_element * (teacher + -(-frozen // shards))


def stream_bytes(config: RunConfig, word: str, forward: cost.ForwardPass) -> int:
    """Return what one more row of the batch keeps of a token in a layer, in bytes."""
    stream = config.model.width * forward.bytes_per_element
    match forward.checkpointing:
        case "none":
            return cost.layer_bytes(config.model, word, forward)
        case "block":
            return stream
        case "selective":
            return stream + cost.product_bytes(config.model, word, forward)


def teacher_of(config: RunConfig) -> RunConfig:
    """Return the teacher's recipe.

    Raises:
        UserError: It cannot be read.
    """
    return saved_config(folder_named("distill.teacher", config.distill.teacher))


def replaced_in(config: RunConfig) -> dict[int, tuple[int, ...]]:
    """Return the layers, and the places in them, in which a student differs from its teacher."""
    return replaced_layers(config.model, teacher_of(config).model)


def comparison_problems(config: RunConfig) -> list[str]:
    """Return what student and teacher do not have in common but must."""
    teacher, name = teacher_of(config), f"distill.teacher={config.distill.teacher}"
    if teacher.train.objective == "energy":
        return [f"{name}: is an energy-based model, which has no layers to imitate"]
    if teacher.model.width != config.model.width:
        return [
            f"model.width={config.model.width}: {name} is {teacher.model.width} wide, and its "
            f"layers can be imitated at that width only; type model.width={teacher.model.width}"
        ]
    try:
        replaced = replaced_layers(config.model, teacher.model)
    except ValueError as error:
        return [f"model.pattern={config.model.pattern}: does not go with {name}: {error}"]
    if not replaced and config.distill.train_only == "new":
        return [
            f"distill.train_only=new: {name} has every layer of this recipe, so nothing would be "
            "trained; type distill.train_only=all"
        ]
    return []


def digest_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the first 64 bits of a digest over all weights of a model on the CPU, (1,) int64."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(cast(torch.Tensor, tensor).contiguous().numpy().tobytes())
    return torch.tensor([int.from_bytes(digest.digest()[:8], "little", signed=True)])
