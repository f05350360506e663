"""What an energy-based model gains by thinking: more steps of descent, and the best of several.

Gladstone et al. 2025 (arXiv 2507.02092, section 4) let a model think longer (more steps than in
training) and verify itself: several descents from random starts, of which every position keeps the
one with the lowest final energy. Both are measured here on held-out text, beside two controls that
tell whether the energy ranks candidates at all: a choice at random, which is the mean over samples,
and the choice of who knows the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.prepare import prepare
from interlace.trainer.data.rows import ValidationRows, positions_of, segments_of
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.energy.draws import Draws
from interlace.trainer.models.energy.model import EnergyModel, Past
from interlace.trainer.saved_model import SavedModel

BINS = 20
"""Groups of equal size, by energy, whose mean loss is told."""

ROWS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How far to think.

    Attributes:
        steps: Steps of descent.
        samples: Descents for every position.
        rows: Held-out rows to read.
        seed: Fixes the random starts.
    """

    steps: int
    samples: int
    rows: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Thought:
    """What thinking came to; losses in nats per token.

    Attributes:
        positions: Predicted tokens.
        trained_steps: Steps that the model took in training, at most.
        counts: Numbers of samples, rising.
        chosen: Loss of the choice by energy, for each count of samples and each step from 1.
        random: Loss of a choice at random after each step.
        known: Loss of the choice of who knows the answer, for each count, after the last step.
        energies: Mean energy of each of 20 groups of candidates, all samples after the last step.
        errors: Mean loss of each group.
        rank_correlation: Spearman's, of energy and loss over all those candidates; positive where
            low energy means low loss.
        better_than_random: Share of positions whose choice by energy, of all samples, has less loss
            than the samples' mean; None for one sample.
    """

    positions: int
    trained_steps: int
    counts: list[int]
    chosen: list[list[float]]
    random: list[float]
    known: list[float]
    energies: list[float]
    errors: list[float]
    rank_correlation: float
    better_than_random: float | None


@torch.no_grad()
def think(saved: SavedModel, settings: Thinking, progress: Callable[[int, int], None]) -> Thought:
    """Let a saved model think about held-out text of its recipe.

    Args:
        saved: A model that was trained with `train.objective = "energy"`.
        settings: How far.
        progress: Told rows done and rows in all.

    Raises:
        ConfigError: The model has no energy.
    """
    model = saved.model
    if not isinstance(model, EnergyModel):
        raise ConfigError(
            [
                f"train.objective={saved.config.train.objective}: thinking descends an energy, and "
                "this model has none; train one with train.objective=energy"
            ]
        )
    corpus = prepare(saved.config.data, announce=lambda text: None)
    rows = ValidationRows(corpus, saved.config)
    count = min(settings.rows, rows.count)
    energies, losses = list[torch.Tensor](), list[torch.Tensor]()
    for first in range(0, count, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, count)
        whole = torch.from_numpy(rows.batch(first, last))
        end = corpus.index.end_of_text if saved.config.data.respect_documents else None
        found = descents(model, whole, end, settings, range(first, last))
        energies.append(torch.stack([each[0] for each in found]))
        losses.append(torch.stack([each[1] for each in found]))
        progress(last, count)
    trained = steps_in_training(saved.config)
    return judge(torch.cat(energies, 2), torch.cat(losses, 2), trained)


def steps_in_training(config: RunConfig) -> int:
    """Return the most steps of descent that a recipe trains with."""
    return config.energy.steps - 1 + config.energy.most_last_steps


def descents(
    model: EnergyModel,
    whole: torch.Tensor,
    end_of_text: int | None,
    settings: Thinking,
    numbers: range,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Descend at every position of rows (B, T + 1), once for each sample.

    Returns:
        For each sample, energy and loss of every candidate after each step, (steps, B T) each.
    """
    device = model.embedding.weight.device
    tokens, targets = whole[:, :-1].to(device), whole[:, 1:].to(device)
    segments, positions = None, torch.arange(tokens.shape[1], device=device)[None]
    if end_of_text is not None:
        documents = segments_of(whole[:, :-1].numpy(), end_of_text)
        segments = torch.from_numpy(documents).to(device)
        positions = torch.from_numpy(positions_of(documents)).to(device)
    past = model.observe(tokens, segments, positions)
    last = model.energy.steps - 1
    landscapes = [min(number, last) for number in range(settings.steps)]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for sample in range(settings.samples):
        keys = [f"{settings.seed}/think {sample}/row {number}" for number in numbers]
        found.append(trace(model, past, Draws(model.energy, keys, landscapes, device), targets))
    return found


def trace(
    model: EnergyModel, past: Past, draws: Draws, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return energy and loss, (steps, B T), of the candidates for `targets` (B, T) step by step."""
    length, entries = targets.shape[1], model.embedding.weight.shape[0]
    rates = draws.rates(model.step_size, length)
    logits = draws.start(length, entries)
    energies, losses = list[torch.Tensor](), list[torch.Tensor]()
    for number, landscape in enumerate(draws.landscapes):
        noise = draws.noise(number, length, entries)
        noisy = logits if noise is None else logits + noise
        logits = model.step(noisy, past, rates, landscape).logits
        energies.append(model.energies(logits.softmax(-1), past, landscape).flatten())
        flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(flat)
    return torch.stack(energies).float().cpu(), torch.stack(losses).float().cpu()


def judge(energies: torch.Tensor, losses: torch.Tensor, trained_steps: int) -> Thought:
    """Sum up energies and losses, (samples, steps, positions) each."""
    from scipy.stats import spearmanr

    samples, _, positions = losses.shape
    counts = [2**power for power in range(samples.bit_length())]
    if counts[-1] != samples:
        counts.append(samples)
    final_energies, final_losses = energies[:, -1], losses[:, -1]
    groups = grouped(final_energies.flatten(), final_losses.flatten())
    pairs = final_energies.flatten().numpy(), final_losses.flatten().numpy()
    correlation, _ = cast(tuple[float, float], spearmanr(*pairs))
    better = None
    if samples > 1:
        picked = final_losses.gather(0, final_energies.argmin(0, keepdim=True))[0]
        better = float((picked < final_losses.mean(0)).double().mean())
    return Thought(
        positions=positions,
        trained_steps=trained_steps,
        counts=counts,
        chosen=[by_energy(energies[:count], losses[:count]) for count in counts],
        random=cast(list[float], losses.double().mean((0, 2)).tolist()),
        known=[float(final_losses[:count].amin(0).double().mean()) for count in counts],
        energies=groups[0],
        errors=groups[1],
        rank_correlation=float(correlation),
        better_than_random=better,
    )


def by_energy(energies: torch.Tensor, losses: torch.Tensor) -> list[float]:
    """Return the mean loss, after each step, of the samples with the lowest energy; both
    (samples, steps, positions).
    """
    chosen = losses.gather(0, energies.argmin(0, keepdim=True))[0]
    return cast(list[float], chosen.double().mean(-1).tolist())


def grouped(energies: torch.Tensor, losses: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean energy and mean loss of groups of equal size, from low energy to high; (N,)
    each.
    """
    order = energies.argsort()
    groups: Sequence[torch.Tensor] = order.tensor_split(min(BINS, len(order)))
    means = [(energies[group].double().mean(), losses[group].double().mean()) for group in groups]
    return [float(energy) for energy, _ in means], [float(loss) for _, loss in means]
