"""The model: two streams through one stack, and the descent inside one forward pass.

The context stream runs the observed tokens once. Then candidates, distributions over the
vocabulary, go through the same weights, are scored by one number each, and are moved along that
number's gradient a few times. What they end as are the logits of the next tokens; there is no
output head. The published form has both streams in one sequence of twice the length and runs it
anew in every step; with the step's signal on candidates alone the two are the same function, at
about 60 % of the matrix products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

from interlace.kernels import linear
from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models import model as models
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.energy.candidates import (
    Modulation,
    Standpoint,
    by_block,
    candidate_layer,
)
from interlace.trainer.models.energy.context import context_layer, last_attention
from interlace.trainer.models.energy.draws import Draws, landscapes_of
from interlace.trainer.models.energy.initial import initial_value
from interlace.trainer.models.energy.inner_step import (
    Function,
    Recompute,
    Slope,
    Stage,
    Step,
    energies_of,
    graph_free_step,
    plain_step,
)
from interlace.trainer.models.energy.loss import Descent, descend
from interlace.trainer.models.language_model import Layer, rotary_in
from interlace.trainer.models.layers import Embedding, Linear, RMSNorm
from interlace.trainer.models.model import Caches, Model

Checkpointing = Literal["none", "block", "selective"]


class EnergyLoss(NamedTuple):
    """Losses of one pass.

    Attributes:
        objective: What is differentiated, a scalar.
        mean_nll: Nats per token after the last step, of the fresh rows.
        details: Scalars for the log.
        logits: After the last step, (B, T, V) in fp32 at least, without a graph.
    """

    objective: torch.Tensor
    mean_nll: torch.Tensor
    details: dict[str, torch.Tensor]
    logits: torch.Tensor


@dataclass(frozen=True)
class Past:
    """What candidates stand before.

    Attributes:
        observed: Keys and values of all attention blocks in turn, (B, G, S, K) each.
        place: Where the candidates are.
    """

    observed: tuple[torch.Tensor, ...]
    place: Standpoint


@dataclass(frozen=True)
class StepLandscape:
    """The energy that a model gives candidates in one step (`inner_step.Landscape`)."""

    model: "EnergyModel"
    place: Standpoint
    number: int
    recompute: Recompute

    def stages(self, observed: Sequence[torch.Tensor], order: int) -> list[Stage]:
        """Return embedding, layers and head as functions of what comes before."""
        model = self.model
        blocks = by_block(observed)
        modulations = iter(model.modulations_of(self.number))
        stages: list[Stage] = [partial(model.embed_candidates, self.number)]
        for letters, layer in zip(layer_patterns(model.config), model.layers, strict=True):
            seen = [next(blocks) for letter in letters if letter == "A"]
            moved = [next(modulations) for _ in letters]
            layer = cast(Layer, layer)
            stages.append(partial(candidate_layer, layer, seen, moved, self.place, order))
        return [*stages, model.score]

    def weights(self) -> list[torch.Tensor]:
        """Return everything that is trained but the step size."""
        named = self.model.named_parameters()
        return [weight for name, weight in named if name != "step_size" and weight.requires_grad]


class EnergyModel(Model):
    """Next-token model that predicts by descent on a learnt energy.

    Args:
        config: The shape of the stack, of A and F blocks.
        energy: How it descends.
        vocabulary_size: V.
        compute_dtype: Of activations; candidates and energies are in fp32 at least.
        checkpointing: What is recomputed, layer by layer, in both streams: nothing, all, or all but
            matrix products and attention.
    """

    step_size: torch.Tensor
    readouts = MappingProxyType({"energy_head.weight": "fan_in"})

    def __init__(
        self,
        config: ModelSection,
        energy: EnergySection,
        vocabulary_size: int,
        compute_dtype: torch.dtype = torch.float32,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        self.config, self.energy = config, energy
        self.compute_dtype = compute_dtype
        self.checkpointing = checkpointing
        width, words = config.width, layer_patterns(config)
        self.embedding = Embedding(vocabulary_size, width)
        self.layers = nn.ModuleList(Layer(letters, config) for letters in words)
        self.norm = RMSNorm(width, config.norm_epsilon)
        own = energy.candidate_table == "own"
        self.candidate_proj = Linear(vocabulary_size, width) if own else None
        told = energy.variant != "none"
        self.step_embed = Embedding(energy.steps, width) if told else None
        blocks = len("".join(words)) if energy.variant == "adaln" else 0
        self.modulations = nn.ModuleList(Linear(width, 3 * width) for _ in range(blocks))
        self.energy_head = Linear(width, 1)
        if energy.learn_step_size:
            self.step_size = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("step_size", torch.empty(1))

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        draws: Draws,
        *,
        segments: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        fresh: int | None = None,
        weight: float | None = None,
    ) -> EnergyLoss:
        """Return the losses of predicting `targets`.

        Everything happens in here, the inner gradient included, so that sharded weights are whole.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each.
            draws: What is random, and how many steps are taken.
            segments: (B, T) document numbers that attention does not cross, or None.
            positions: (B, T) positions inside the documents; counted from 0 by default.
            fresh: Rows from the first that are reported; the others are replayed. All by default.
            weight: Share of every row in the objective; by default they add up to one. No tensor,
                which sharding would round to the compute dtype.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        past = self.observe(tokens, segments, positions)
        weight = 1 / len(tokens) if weight is None else weight
        found = self.descent(past, draws, targets, weight)
        return self.report(found, len(tokens) if fresh is None else fresh)

    def descent(self, past: Past, draws: Draws, targets: torch.Tensor, weight: float) -> Descent:
        """Descend from where the draws say and return all of it; shapes as in `forward`."""
        shape = targets.shape[1], self.embedding.weight.shape[0]
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        rates = draws.rates(self.step_size, shape[0]).to(wide)

        def noise(number: int) -> torch.Tensor | None:
            drawn = draws.noise(number, *shape)
            return None if drawn is None else drawn.to(wide)

        return descend(
            draws.start(*shape).to(wide),
            noise,
            lambda logits, number: self.step(logits, past, rates, draws.landscapes[number]),
            len(draws.landscapes),
            self.energy,
            targets,
            weight,
        )

    def report(self, found: Descent, fresh: int) -> EnergyLoss:
        """Return a descent's losses and what the log tells of its first `fresh` rows."""
        losses, energies = found.row_losses[:, :fresh].mean(-1), found.energies[:, :fresh].mean(-1)
        details = {
            "energy_gap": energies[0] - energies[-1],
            "inner_gradient_norm": found.gradient_norms[:, :fresh].mean(),
            "step_size": self.step_size.detach().float().sum(),
        }
        details |= {f"loss_step_{number}": each for number, each in enumerate(losses, start=1)}
        return EnergyLoss(found.objective, losses[-1].clone(), details, found.logits)

    def step(self, logits: torch.Tensor, past: Past, rates: torch.Tensor, landscape: int) -> Step:
        """Take one step of descent from logits (B, T, V)."""
        seen = StepLandscape(self, past.place, landscape, self.recomputed)
        slope = Slope(seen, past.observed, rates, self.energy.update_base)
        take = plain_step if self.energy.inner_step == "plain" else graph_free_step
        return take(logits, slope)

    def energies(self, probabilities: torch.Tensor, past: Past, landscape: int) -> torch.Tensor:
        """Return the energy of every candidate (B, T, V), (B, T) in fp32 at least."""
        seen = StepLandscape(self, past.place, landscape, self.recomputed)
        return energies_of(seen, past.observed, probabilities, 2)

    def observe(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor | None,
        positions: torch.Tensor,
        caches: Caches | None = None,
        *,
        last_only: bool = False,
    ) -> Past:
        """Run the context stream over tokens (B, T) at positions (B or 1, T)."""
        context = BlockContext(
            rotary=rotary_in(self.compute_dtype, positions, self.config), segments=segments
        )
        x = functional.embedding(tokens, self.embedding.weight).to(self.compute_dtype)
        stop = last_attention(layer_patterns(self.config))
        observed: list[torch.Tensor] = []
        for number, layer in enumerate(self.layers[: stop[0] + 1]):
            kept = None if caches is None else caches[number]
            until = stop[1] if number == stop[0] else None
            run = partial(context_layer, cast(Layer, layer), context, kept, until)
            x, *found = run(x) if kept is not None else self.recomputed(run)(x)
            observed += found
        ahead = (positions[:, -1:] if last_only else positions) + 1
        place = Standpoint(rotary_in(self.compute_dtype, ahead, self.config), segments)
        return Past(tuple(observed), place)

    def recomputed(self, function: Function) -> Function:
        """Return a function as the recipe's activation checkpointing has it."""
        from interlace.trainer.parallel import checkpointed

        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return function
        return checkpointed(self.checkpointing == "selective", function)

    def embed_candidates(self, number: int, probabilities: torch.Tensor) -> torch.Tensor:
        """Return candidates (B, T, V) as inputs of the stack, (B, T, D), told the landscape."""
        narrow = probabilities.to(self.compute_dtype)
        if self.candidate_proj is None:
            x = linear(narrow, self.embedding.weight.to(narrow.dtype).T)
        else:
            x = self.candidate_proj(narrow)
        if self.step_embed is None or self.energy.variant != "time_embed":
            return x
        return x + self.step_embed.weight[number].to(x.dtype)

    def modulations_of(self, number: int) -> list[Modulation | None]:
        """Return what adaLN does to each block on a landscape."""
        if self.step_embed is None or self.energy.variant != "adaln":
            return [None] * len("".join(layer_patterns(self.config)))
        signal = functional.silu(self.step_embed.weight[number].to(self.compute_dtype))
        return [Modulation(*each(signal).chunk(3)) for each in self.modulations]

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Return the energies (B, T), in fp32 at least, of the stack's outputs (B, T, D)."""
        normed = self.norm(x)
        return self.energy_head(normed.to(torch.promote_types(x.dtype, torch.float32))).squeeze(-1)

    def logits(
        self, tokens: torch.Tensor, caches: Caches | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """Return the fp32 logits that descents end with, for one document per row.

        A descent takes as many steps as in validation, without noise. Its start is drawn anew for
        every position, from the position alone, so a prefix in a cache makes no difference.

        Args:
            tokens: (B, T) int64; with caches, the tokens that follow those in the caches.
            caches: Decoding state from `new_caches`, which is advanced.
            last_only: Descend at the last position only.

        Returns:
            (B, T, V), or (B, 1, V) for the last position.
        """
        start = 0
        if caches is not None:
            found = (each.length for layer in caches for each in layer if each is not None)
            start = next(found, 0)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        past = self.observe(tokens, None, positions, caches, last_only=last_only)
        numbers = [start + tokens.shape[1] - 1] if last_only else positions[0].tolist()
        settings = self.energy.model_copy(update={"langevin_noise": 0.0})
        landscapes = landscapes_of(settings, settings.most_last_steps)
        draws = Draws(settings, [f"position {n}" for n in numbers], landscapes, tokens.device)
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        logits = draws.start(1, self.embedding.weight.shape[0]).transpose(0, 1)
        logits = logits.expand(len(tokens), -1, -1).to(wide)
        rates = draws.rates(self.step_size, len(numbers)).to(wide)
        with torch.no_grad():
            for number in landscapes:
                logits = self.step(logits, past, rates, number).logits
        return logits.float()

    def new_caches(self, batch: int, length: int) -> Caches:
        """Return empty decoding state of the context stream for `length` positions."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        stop, block = last_attention(layer_patterns(self.config))
        caches = [cast(Layer, layer).new_caches(batch, length, like) for layer in self.layers]
        # Behind the last attention block nothing of the context is read.
        return [*caches[:stop], caches[stop][: block + 1]]

    @property
    def units(self) -> list[nn.Module]:
        """None: the whole model is one unit, since the inner gradient goes through all layers
        within a forward pass, where all weights must be whole. Layers are recomputed one by one
        all the same (`recomputed`), in both streams.
        """
        return []

    def balance_experts(self, loads: Sequence[torch.Tensor]) -> None:
        """There are no experts."""

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """The learnt step size has a learning rate of its own, and no decay."""
        return {"step_size": self.energy.step_size_lr_factor} if self.energy.learn_step_size else {}

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Return the whole initial value of one parameter or buffer, fp32 on the CPU."""
        own = initial_value(name, shape, seed, self.energy)
        return models.initial_value(name, shape, seed, self.config) if own is None else own
