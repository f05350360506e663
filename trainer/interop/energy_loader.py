"""Runs the Energy-Based Transformer in this folder; needs torch and safetensors, nothing else.

A prediction is a descent (Gladstone et al. 2025, arXiv 2507.02092): at every position a candidate,
one number per vocabulary entry, starts at random and follows the negative gradient of an energy;
where it ends are the logits of the next token. Observed tokens are an ordinary causal Transformer;
a candidate attends to the observed positions up to its own and to itself.

    from energy_transformer import EnergyTransformer
    model = EnergyTransformer(".")
    logits = model.logits(tokens)            # (B, T) int64 to (B, T, V)
    more = model.generate(tokens[:1], 50)    # 50 tokens behind the first row

Plain on purpose, for reading and checking: attention is written out, and nothing is cached.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

Tensor = torch.Tensor
Observed = list[tuple[Tensor, Tensor]]


class EnergyTransformer:
    """An energy-based language model from its folder.

    Args:
        folder: Where `config.json` and `model.safetensors` lie.
        device: Where to compute.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.model: dict[str, Any] = about["model"]
        self.energy: dict[str, Any] = about["energy"]
        self.end_of_text = int(about["eos_token_id"])
        self.weights = load_file(str(Path(folder) / "model.safetensors"), device=device)
        self.trained_steps = self.energy["steps"] - 1 + self.energy["most_last_steps"]

    def logits(self, tokens: Tensor, steps: int | None = None, seed: str = "position") -> Tensor:
        """Return where descents end, (B, T, V).

        Args:
            tokens: (B, T) int64.
            steps: Steps of descent; as in training by default, more to think longer.
            seed: Names the random starts, which depend on it and on the position only.
        """
        observed = self.observe(tokens)
        table = self.weights["embedding.weight"]
        starts = [start(f"{seed} {t}/start", len(table), tokens) for t in range(tokens.shape[1])]
        logits = self.energy["start_scale"] * torch.stack(starts).to(table.dtype)
        logits = logits.expand(len(tokens), -1, -1)
        for number in range(self.trained_steps if steps is None else steps):
            logits = self.step(logits, observed, min(number, self.energy["steps"] - 1))
        return logits

    def step(self, logits: Tensor, observed: Observed, landscape: int) -> Tensor:
        """Descend once from logits (B, T, V)."""
        overwrite = self.energy["update_base"] == "probabilities"
        with torch.enable_grad():
            point = (logits.softmax(-1) if overwrite else logits).detach().requires_grad_()
            given = point if overwrite else point.softmax(-1)
            energies = self.energies(given, observed, landscape)
            (gradient,) = torch.autograd.grad(energies.sum(), point)
        rate = self.weights["step_size"].clamp(min=self.energy["step_size_floor"])
        return (point - rate * gradient).detach()

    def energies(self, candidates: Tensor, observed: Observed, landscape: int) -> Tensor:
        """Return the energy of every candidate, (B, T), given as probabilities (B, T, V)."""
        if self.energy["candidate_table"] == "own":
            x = functional.linear(candidates, self.weights["candidate_proj.weight"])
        else:
            x = candidates @ self.weights["embedding.weight"]
        if self.energy["variant"] == "time_embed":
            x = x + self.weights["step_embed.weight"][landscape]
        seen, places = iter(observed), torch.arange(1, x.shape[1] + 1, device=x.device)
        for number, (letter, name) in enumerate(self.blocks()):
            normed, gate = self.modulated(self.norm(x, f"{name}.norm"), number, landscape)
            if letter == "A":
                mixed = self.attend_candidates(normed, next(seen), places, f"{name}.mixer")
            else:
                mixed = self.feed_forward(normed, f"{name}.mixer")
            x = x + gate * mixed
        return functional.linear(self.norm(x, "norm"), self.weights["energy_head.weight"])[..., 0]

    def modulated(self, x: Tensor, block: int, landscape: int) -> tuple[Tensor, Tensor | float]:
        """Return what goes into a block's mixer and the gate of its result (adaLN-zero)."""
        if self.energy["variant"] != "adaln":
            return x, 1.0
        signal = functional.silu(self.weights["step_embed.weight"][landscape])
        matrix = self.weights[f"modulations.{block}.weight"]
        shift, scale, gate = functional.linear(signal, matrix).chunk(3)
        return x * (1 + scale) + shift, gate

    def observe(self, tokens: Tensor) -> Observed:
        """Run the observed tokens (B, T) and return keys and values of every attention block."""
        x = self.weights["embedding.weight"][tokens]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        found: Observed = []
        for letter, name in self.blocks():
            normed = self.norm(x, f"{name}.norm")
            if letter == "F":
                x = x + self.feed_forward(normed, f"{name}.mixer")
                continue
            q, k, v = self.project(normed, places, f"{name}.mixer")
            found.append((k, v))
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(later(scores), float("-inf"))
            x = x + self.output(scores.softmax(-1) @ v, f"{name}.mixer")
        return found

    def attend_candidates(
        self, x: Tensor, observed: tuple[Tensor, Tensor], places: Tensor, name: str
    ) -> Tensor:
        """Attend from candidates (B, T, D) to observed positions up to theirs and themselves."""
        q, k, v = self.project(x, places, name)
        keys, values = observed
        scores = q @ keys.transpose(-1, -2)
        scores = scores.masked_fill(later(scores), float("-inf"))
        alone = (q * k).sum(-1, keepdim=True)
        shares = (torch.cat([scores, alone], -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.output(shares[..., :-1] @ values + shares[..., -1:] * v, name)

    def project(self, x: Tensor, places: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return turned queries and keys, and values, (B, H, T, K) each; keys serve their group."""
        width = self.model["head_width"]
        q, k, v = (
            functional.linear(x, self.weights[f"{name}.{part}.weight"]).unflatten(-1, (-1, width))
            for part in ("query", "key", "value")
        )
        if self.model["query_key_norm"]:
            q, k = self.norm(q, f"{name}.query_norm"), self.norm(k, f"{name}.key_norm")
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.model["positions"] == "rope":
            q, k = self.turned(q, places), self.turned(k, places)
        group = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotary embedding of (B, H, T, K) in the half-split layout."""
        width = x.shape[-1]
        powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        angles = places[:, None].float() * self.model["rope_base"] ** -powers
        cosine, sine = angles.cos(), angles.sin()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def output(self, mixed: Tensor, name: str) -> Tensor:
        """Project (B, H, T, K) back to the width."""
        return functional.linear(
            mixed.transpose(1, 2).flatten(2), self.weights[f"{name}.output.weight"]
        )

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        """SwiGLU."""
        gate, up, down = (self.weights[f"{name}.{part}.weight"] for part in ("gate", "up", "down"))
        return functional.linear(
            functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Root mean square norm with a gain."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model["norm_epsilon"])
        return x * scale * self.weights[f"{name}.weight"]

    def blocks(self) -> Iterator[tuple[str, str]]:
        """Yield every block's letter (A: attention, F: feed-forward) and name."""
        for layer, letters in enumerate(self.model["layers"]):
            for block, letter in enumerate(letters):
                yield letter, f"layers.{layer}.blocks.{block}"

    def generate(self, tokens: Tensor, count: int, temperature: float = 0.8) -> list[int]:
        """Return up to `count` tokens behind tokens (1, T), which open with the end of text."""
        found: list[int] = []
        for _ in range(count):
            logits = self.logits(tokens)[0, -1]
            if temperature == 0.0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1))
            if token == self.end_of_text:
                break
            found.append(token)
            tokens = torch.cat([tokens, tokens.new_tensor([[token]])], 1)
        return found


def later(scores: Tensor) -> Tensor:
    """Return which keys (last dimension) come after each query."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def start(key: str, entries: int, like: Tensor) -> Tensor:
    """Return the standard normal numbers that a key names, (entries,)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn((1, entries), generator=generator, device=like.device)[0]
