"""Objective `energy`: next tokens by descent on a learnt energy (Energy-Based Transformers,
Gladstone et al. 2025, arXiv 2507.02092).

The model descends inside its forward pass (`trainer.models.energy`); here are the draws of a
micro-batch, its replayed rows, and what stands against a recipe. The published recipes S1 and S2
are in `trainer.config.energy_section`. The first losses are far above those of even guesses and the
first gradients large: clipping and warm-up carry weight here.

Everything random is a function of the seed, the step and the row's number, so a resumed run draws
the same, and so does any number of ranks.
"""

from collections.abc import Mapping, Sequence

import torch

from interlace.trainer.batches import Batch
from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.cost import ForwardPass
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.energy import cost
from interlace.trainer.models.energy.draws import Draws, landscapes_of, replaying_rows
from interlace.trainer.models.energy.model import EnergyLoss, EnergyModel
from interlace.trainer.models.initial import generator_of
from interlace.trainer.models.model import Model
from interlace.trainer.models.registry import Flops, registered_letters
from interlace.trainer.objectives import Loss, objective
from interlace.trainer.objectives.replay import ReplayBuffer, Shape
from interlace.trainer.plan import Plan
from interlace.trainer.world import World

TWICE_DIFFERENTIABLE = ("auto", "chunked", "reference", "triton")
"""Back ends of attention that have a second derivative."""


@objective("energy")
class Energy:
    """Likelihood of the next tokens after a descent."""

    compiles = False

    def __init__(self, config: RunConfig, plan: Plan, world: World) -> None:
        self.settings, self.seed = config.energy, config.run.seed
        rows = replaying_rows(config.energy, plan.rows_per_step)
        self.share = len(rows) / plan.rows_per_step
        self.buffer: ReplayBuffer | None = None
        if rows:
            shape = Shape(
                rows=rows,
                depth=config.energy.replay_rows // len(rows),
                length=plan.sequence_length,
                vocabulary_size=plan.vocabulary_size,
                documents=config.data.respect_documents,
            )
            self.buffer = ReplayBuffer(shape, world)

    @classmethod
    def problems(cls, config: RunConfig) -> list[str]:
        """Return what an energy model cannot do, and settings that would have no effect."""
        checks = (blocks, attention_kernels, steps, replay, training)
        return [problem for check in checks for problem in check(config)]

    @classmethod
    def build(cls, config: RunConfig, vocabulary_size: int, dtype: torch.dtype) -> EnergyModel:
        """Return the model of a recipe, without values."""
        recompute = config.train.activation_checkpointing
        return EnergyModel(config.model, config.energy, vocabulary_size, dtype, recompute)

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the losses of a micro-batch and its replayed rows, and keep what it ended with."""
        fresh = len(batch.tokens)
        tensors = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "segments": batch.segments,
            "positions": batch.positions,
        }
        starts, rows = None, list[int]()
        if self.buffer is not None:
            replayed, rows = self.buffer.replayed(batch, self.seed)
            if rows:
                starts = replayed["logits"]
                tensors = {
                    name: None if given is None else torch.cat([given, replayed[name]])
                    for name, given in tensors.items()
                }
        # A row weighs the same in every micro-batch, whatever number of rows that replays.
        share = self.share if batch.step > 0 else 0.0
        weight = 1 / (fresh * (1 + share))
        draws = self.draws(batch, rows, starts)
        found = descended(model, tensors, draws, fresh, weight)
        if self.buffer is not None:
            self.buffer.keep(batch, found.logits[:fresh])
        return Loss(found.objective, found.mean_nll, details=found.details)

    def held_out_nll(self, model: Model, batch: Batch) -> torch.Tensor:
        """Return the likelihood after most steps, with noise but without drawn step sizes."""
        tensors = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "segments": batch.segments,
            "positions": batch.positions,
        }
        draws = self.draws(batch, [], None)
        return descended(model, tensors, draws, len(batch.tokens), None).mean_nll

    def draws(self, batch: Batch, replayed: Sequence[int], starts: torch.Tensor | None) -> Draws:
        """Return the randomness of a batch and its replayed rows."""
        settings, training = self.settings, batch.step >= 0
        keys = [f"{self.seed}/{batch.step}/{row}" for row in batch.rows]
        keys += [f"{self.seed}/{batch.step}/{row}/again" for row in replayed]
        last = settings.most_last_steps
        if training:
            last = drawn_steps(settings, f"{self.seed}/{batch.step}/steps")
        return Draws(
            settings=settings,
            keys=keys,
            landscapes=landscapes_of(settings, last),
            device=batch.tokens.device,
            spread=training,
            starts=starts,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return the replay buffer."""
        return {} if self.buffer is None else self.buffer.state()

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with a replay buffer."""
        if self.buffer is not None:
            self.buffer.restore(tensors)

    @classmethod
    def parameter_count(cls, config: RunConfig, vocabulary_size: int) -> int:
        """Return the trained parameters."""
        return cost.parameter_count(config.model, config.energy, vocabulary_size)

    @classmethod
    def flops_per_token(cls, config: RunConfig, vocabulary_size: int) -> Flops:
        """Return the cost of a token's descent of mean length, and of its share of replays."""
        rows = config.train.tokens_per_step // config.data.sequence_length
        share = len(replaying_rows(config.energy, rows)) / rows
        length = config.data.sequence_length
        one = cost.flops_per_token(config.model, config.energy, vocabulary_size, length)
        return Flops(round(one.forward * (1 + share)), round(one.backward * (1 + share)))

    @classmethod
    def activation_bytes(cls, config: RunConfig, vocabulary_size: int, forward: ForwardPass) -> int:
        """Return what one pass keeps at most, replayed rows included."""
        return cost.activation_bytes(config, vocabulary_size, forward)


def descended(
    model: Model,
    tensors: Mapping[str, torch.Tensor | None],
    draws: Draws,
    fresh: int,
    weight: float | None,
) -> EnergyLoss:
    """Run an energy model over rows, through the hooks of sharding."""
    found: EnergyLoss = model(
        tensors["tokens"],
        tensors["targets"],
        draws,
        segments=tensors["segments"],
        positions=tensors["positions"],
        fresh=fresh,
        weight=weight,
    )
    return found


def drawn_steps(settings: EnergySection, key: str) -> int:
    """Return how often a training step descends the last landscape."""
    least, most = settings.fewest_last_steps, settings.most_last_steps
    generator = generator_of(key, torch.device("cpu"))
    return int(torch.randint(least, most + 1, (1,), generator=generator))


def blocks(config: RunConfig) -> list[str]:
    """Blocks need a second derivative and a way to meet candidates."""
    letters = list(dict.fromkeys("".join(layer_patterns(config.model))))
    strange = [letter for letter in letters if letter not in "AF"]
    names = ", ".join(f"{letter} ({registered_letters()[letter]})" for letter in strange)
    found: list[str] = []
    if strange:
        found.append(
            f"model.pattern={config.model.pattern}: train.objective=energy has no candidate path "
            f"and no second derivative for {names}; type a model.pattern of A (attention) and F "
            "(swiglu) blocks, such as model.pattern=AF"
        )
    if "A" not in letters:
        found.append(
            f"model.pattern={config.model.pattern}: without attention a candidate sees no context; "
            "type model.pattern=AF"
        )
    return found


def attention_kernels(config: RunConfig) -> list[str]:
    """Attention is differentiated twice."""
    name, inner = config.model.attention_backend, config.energy.inner_step
    if name not in TWICE_DIFFERENTIABLE:
        return [
            f"model.attention_backend={name}: has no second derivative, which "
            "train.objective=energy needs; type model.attention_backend=auto"
        ]
    if name == "reference" and inner == "graph_free":
        return [
            f"model.attention_backend={name}: torch's softmax has no derivative of its tangent, "
            "which energy.inner_step=graph_free needs; type model.attention_backend=chunked or "
            "energy.inner_step=plain"
        ]
    return []


def steps(config: RunConfig) -> list[str]:
    """The numbers of steps are a range, and what is truncated is not trained on."""
    energy, found = config.energy, list[str]()
    if energy.fewest_last_steps > energy.most_last_steps:
        found.append(
            f"energy.fewest_last_steps={energy.fewest_last_steps}: is more than "
            f"energy.most_last_steps={energy.most_last_steps}; type "
            f"energy.most_last_steps={energy.fewest_last_steps}"
        )
    if energy.truncate and energy.loss_steps == "every":
        found.append(
            "energy.truncate=true: leaves only the last step a gradient, and "
            "energy.loss_steps=every would train those before it; type energy.loss_steps=last"
        )
    return found


def replay(config: RunConfig) -> list[str]:
    """Some rows replay, and each has somewhere to go back to."""
    energy = config.energy
    rows = config.train.tokens_per_step // config.data.sequence_length
    if not energy.replay_rows or rows == 0:
        return []
    replaying = len(replaying_rows(energy, rows))
    if not replaying:
        return [
            f"energy.replay_share={energy.replay_share}: is less than one of the {rows} rows of a "
            f"step, so nothing would be replayed; type energy.replay_share={1 / rows} or "
            "energy.replay_rows=0"
        ]
    if energy.replay_rows < replaying:
        return [
            f"energy.replay_rows={energy.replay_rows}: is less than the {replaying} rows that a "
            f"step replays; type energy.replay_rows={replaying} or lower energy.replay_share"
        ]
    return []


def training(config: RunConfig) -> list[str]:
    """Settings that would do nothing here, or that a second derivative does not go with."""
    train, found = config.train, list[str]()
    if config.model.tie_embeddings:
        found.append(
            "model.tie_embeddings=true: an energy model has no output head to tie; type "
            "energy.candidate_table=tokens to share the token embeddings with candidates"
        )
    if train.z_loss:
        found.append(
            f"train.z_loss={train.z_loss}: candidates are normalised at every step, so their "
            "partition is not trained; type train.z_loss=0"
        )
    if train.activation_checkpointing == "selective" and config.energy.inner_step == "plain":
        found.append(
            "train.activation_checkpointing=selective: keeps results for one backward pass, and "
            "energy.inner_step=plain takes two; type train.activation_checkpointing=block or "
            "energy.inner_step=graph_free"
        )
    if train.compile:
        found.append(
            "train.compile=true: compiled layers have no second derivative; type "
            "train.compile=false"
        )
    return found
