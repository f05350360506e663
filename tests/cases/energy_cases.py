"""Small energy models, and the published form of theirs written out in plain torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.energy.draws import Draws, landscapes_of
from interlace.trainer.models.energy.model import EnergyModel

VOCABULARY = 37

SHAPES = {
    "plain": ModelSection(width=32, heads=4, layers=2, ffn_width=48),
    "grouped": ModelSection(
        width=32, heads=4, kv_heads=2, query_key_norm=True, layers=2, ffn_width=48
    ),
    "mixed": ModelSection(width=32, heads=2, head_width=24, pattern="FA AFF", layers=1),
    "without positions": ModelSection(width=32, heads=4, positions="none", layers=2),
}

SETTINGS = {
    "S1": EnergySection(step_size=5.0),
    "S2": EnergySection(
        steps=1,
        fewest_last_steps=2,
        most_last_steps=3,
        step_size=5.0,
        learn_step_size=False,
        step_size_spread=2.0,
        langevin_noise=3.0,
        detach=False,
        loss_steps="last",
        truncate=True,
    ),
    "through all steps": EnergySection(
        step_size=2.0, step_size_spread=2.0, detach=False, most_last_steps=2
    ),
    "on logits": EnergySection(step_size=2.0, detach=False, update_base="logits"),
    "detached, last": EnergySection(step_size=5.0, loss_steps="last", langevin_noise=0.5),
    "adaLN": EnergySection(step_size=0.5, variant="adaln", detach=False),
    "tokens' table": EnergySection(step_size=0.5, variant="none", candidate_table="tokens"),
}


def build(
    shape: ModelSection,
    energy: EnergySection,
    dtype: torch.dtype = torch.float64,
    checkpointing: Any = "none",
) -> EnergyModel:
    """Return a model whose weights all matter: those that start at zero are drawn."""
    model = EnergyModel(shape, energy, VOCABULARY, dtype, checkpointing)
    model.to(dtype).initialise(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("step_embed", "modulations", "candidate_proj")):
                weight.normal_(0.0, 0.3, generator=generator)
    return model


def rows_of(count: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Return rows of tokens in documents: two in the first row, one in the others."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (count, length + 1), generator=generator)
    segments = torch.zeros(count, length, dtype=torch.int64)
    segments[0, 5:] = 1
    positions = torch.arange(length).repeat(count, 1)
    positions[0, 5:] -= 5
    inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    return inputs | {"segments": segments, "positions": positions}


def draws_of(energy: EnergySection, count: int = 3, last_steps: int | None = None) -> Draws:
    """Return the draws of so many rows, with the most steps by default."""
    steps = landscapes_of(energy, last_steps or energy.most_last_steps)
    return Draws(
        energy, [f"row {n}" for n in range(count)], steps, torch.device("cpu"), spread=True
    )


def normed(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return RMSNorm as its formula."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def turned(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Return (B, T, H, K) turned by its positions (B, T), pair by pair, as complex numbers."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    # The tables are made in fp32, whatever the model's dtype.
    rates = base ** -torch.arange(0, x.shape[-1], 2, dtype=torch.float32).div(x.shape[-1])
    assert torch.allclose(rates.double(), base**-exponents, rtol=1e-6)
    angles = (positions.float()[..., None] * rates)[:, :, None]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


class Concatenated:
    """The published form: both streams in one sequence of twice the length under a dense mask, run
    anew in every step, and differentiated by torch (arXiv 2507.02092, appendix; with the step's
    signal on candidates alone).

    Reads the parameters of a model by name and calls none of its code.
    """

    def __init__(self, model: EnergyModel) -> None:
        self.shape, self.energy = model.config, model.energy
        self.weights = dict(model.named_parameters()) | dict(model.named_buffers())

    def loss(self, rows: Mapping[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        """Return the objective of rows that weigh the same."""
        settings, length = self.energy, rows["tokens"].shape[1]
        y = draws.start(length, VOCABULARY).to(self.weights["norm.weight"].dtype)
        size = self.weights["step_size"].clamp(min=settings.step_size_floor)
        one = torch.ones(1)
        rates = size * draws.rates(one, length).to(y.dtype)
        losses: list[torch.Tensor] = []
        for number, landscape in enumerate(draws.landscapes):
            last = number == len(draws.landscapes) - 1
            if settings.detach or (last and settings.truncate):
                y = y.detach()
            noise = draws.noise(number, length, VOCABULARY)
            y = (y if noise is None else y + noise).requires_grad_()
            p = y.softmax(-1)
            base = y if settings.update_base == "logits" else p
            total = self.energies(p, rows, landscape).sum()
            (slope,) = torch.autograd.grad(total, base, create_graph=True)
            y = base - rates * slope
            losses.append(functional.cross_entropy(y.flatten(0, 1), rows["targets"].flatten()))
        return losses[-1] if settings.loss_steps == "last" else torch.stack(losses).mean()

    def energies(
        self, p: torch.Tensor, rows: Mapping[str, torch.Tensor], landscape: int
    ) -> torch.Tensor:
        """Return the energy of every candidate, (B, T)."""
        w, length = self.weights, p.shape[1]
        own = self.energy.candidate_table == "own"
        c = p @ (w["candidate_proj.weight"].T if own else w["embedding.weight"])
        if self.energy.variant == "time_embed":
            c = c + w["step_embed.weight"][landscape]
        x = torch.cat([w["embedding.weight"][rows["tokens"]], c], 1)
        places = torch.cat([rows["positions"], rows["positions"] + 1], 1)
        mask = self.mask(rows["segments"])
        count = 0
        for layer, letters in enumerate(layer_patterns(self.shape)):
            for block, letter in enumerate(letters):
                name = f"layers.{layer}.blocks.{block}"
                h = normed(x, w[f"{name}.norm.weight"], self.shape.norm_epsilon)
                shift, scale, gate = self.modulation(count, landscape, length)
                h = h * (1 + scale) + shift
                mixed = self.attend(name, h, places, mask) if letter == "A" else self.gated(name, h)
                x, count = x + gate * mixed, count + 1
        out = normed(x[:, length:], w["norm.weight"], self.shape.norm_epsilon)
        return (out * w["energy_head.weight"][0]).sum(-1)

    def mask(self, segments: torch.Tensor) -> torch.Tensor:
        """Return who sees whom, (B, 2 T, 2 T)."""
        length = segments.shape[1]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        seen = past & (segments[:, :, None] == segments[:, None, :])
        nobody, itself = torch.zeros_like(seen), torch.eye(length, dtype=torch.bool)
        upper = torch.cat([seen, nobody], -1)
        lower = torch.cat([seen, itself.expand_as(seen)], -1)
        return torch.cat([upper, lower], 1)

    def modulation(
        self, block: int, landscape: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return shift, scale and gate of both streams, (2 T, D) each."""
        width = self.shape.width
        neutral = torch.zeros(3, width, dtype=self.weights["norm.weight"].dtype)
        neutral[2] = 1
        parts = neutral
        if self.energy.variant == "adaln":
            signal = self.weights["step_embed.weight"][landscape]
            signal = signal * torch.sigmoid(signal)
            parts = (self.weights[f"modulations.{block}.weight"] @ signal).view(3, width)
        both = torch.cat(
            [neutral[:, None].expand(-1, length, -1), parts[:, None].expand(-1, length, -1)], 1
        )
        return both[0], both[1], both[2]

    def attend(
        self, name: str, h: torch.Tensor, places: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return attention as its formula."""
        w, shape = self.weights, self.shape
        width = shape.head_width or shape.width // shape.heads
        q, k, v = (
            (h @ w[f"{name}.mixer.{part}.weight"].T).unflatten(-1, (-1, width))
            for part in ("query", "key", "value")
        )
        if shape.query_key_norm:
            q = normed(q, w[f"{name}.mixer.query_norm.weight"], shape.norm_epsilon)
            k = normed(k, w[f"{name}.mixer.key_norm.weight"], shape.norm_epsilon)
        if shape.positions == "rope":
            q, k = turned(q, places, shape.rope_base), turned(k, places, shape.rope_base)
        times = shape.heads // k.shape[2]
        k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(width)
        weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        mixed = torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2)
        return mixed @ w[f"{name}.mixer.output.weight"].T

    def gated(self, name: str, h: torch.Tensor) -> torch.Tensor:
        """Return SwiGLU as its formula."""
        gate, up, down = (
            self.weights[f"{name}.mixer.{part}.weight"] for part in ("gate", "up", "down")
        )
        gated = h @ gate.T
        return (gated * torch.sigmoid(gated) * (h @ up.T)) @ down.T


class NoModules:
    """Stands in for what tells a counter the module it is in, which the inner gradient upsets."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """Return a counter that knows our attention: two products forward, five backward."""

    def product(q: Sequence[int], k: Sequence[int]) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    def forward(backend: str, q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * product(q, k)

    def backward(backend: str, q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 5 * product(q, k)

    operations = torch.ops.interlace
    known = {operations.attention_forward: forward, operations.attention_backward: backward}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = NoModules()
    return counter
