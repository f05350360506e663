"""Tokens per second of the trainer against a bare PyTorch loop with the same mathematics, in one
process.

The bare loop below is what one would write in an afternoon: the quickstart's model, document masks,
loss, clipping and AdamW, no checkpoints, no metrics, no checks. Both train on the same rows. Rounds
of the two alternate, so that a noisy machine disturbs both; medians and their ratio are printed.

    python benchmarks/versus_bare_loop.py [--rounds 5] [--steps 10]
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from interlace.trainer.assembly import open_run
from interlace.trainer.config import RunConfig, load_recipe
from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.rules import rule_of
from interlace.trainer.run import Run
from interlace.trainer.world import World


class BareBlock(nn.Module):
    """Attention and SwiGLU, pre-norm, as a tutorial would write them."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        batch, time_, _ = x.shape
        h = self.norm1(x)
        q = self.q(h).view(batch, time_, self.heads, self.size).transpose(1, 2)
        k = self.k(h).view(batch, time_, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(h).view(batch, time_, self.kv_heads, self.size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).reshape(batch, time_, -1))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class BareModel(nn.Module):
    """The quickstart's Transformer."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        super().__init__()
        shape = config.model
        width, hidden = shape.width, shape.ffn_width or 4 * shape.width
        heads, kv_heads = shape.heads, shape.kv_heads or shape.heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            BareBlock(width, heads, kv_heads, hidden) for _ in range(shape.layers)
        )
        self.norm = nn.RMSNorm(width, 1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.size = width // heads

    def forward(
        self, tokens: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return logits (B, T, V)."""
        exponents = torch.arange(0, self.size, 2, device=tokens.device) / self.size
        angles = positions[..., None] * 10_000.0**-exponents
        angles = torch.cat([angles, angles], -1)[:, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (segments[:, :, None] == segments[:, None]) & (places[:, None] >= places)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin(), mask[:, None])
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class BareLoop:
    """The afternoon's training loop."""

    def __init__(self, run: Run) -> None:
        config = run.parts.config
        self.run, self.settings = run, config.optimizer
        self.limit = largest_norm(config) or math.inf
        self.model = BareModel(config, run.plan.vocabulary_size).to(run.parts.world.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.peak_lr,
            betas=(self.settings.beta1, self.settings.beta2),
            weight_decay=rule_of(config).hyperparameters()["weight_decay"],
            fused=True,
        )

    def step(self, number: int) -> float:
        """Train on the rows of one step; return the loss."""
        loss = torch.zeros(())
        for batch in self.run.parts.batches.of_step(number):
            assert batch.segments is not None and batch.positions is not None
            logits = self.model(batch.tokens, batch.segments, batch.positions)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            (loss / self.run.plan.accumulation).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def trainer_step(run: Run, number: int) -> None:
    """One pass through the body of the training loop."""
    loss = run.forward_backward(number)
    run.update_or_skip(number, loss, run.gradient_norm())
    run.validate_if_due()
    run.observe()
    run.checkpoint_if_due()


def measure(run: Run, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Alternate rounds of both loops; return tokens per second of each round."""
    bare = BareLoop(run)
    ours_speed: list[float] = []
    bare_speed: list[float] = []
    remaining = run.remaining_steps()
    for number in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(steps):
            trainer_step(run, next(remaining))
        middle = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            bare.step(step)
        end = time.perf_counter()
        if number:  # the first round warms up
            tokens = steps * run.plan.tokens_per_step
            ours_speed.append(tokens / (middle - start))
            bare_speed.append(tokens / (end - middle))
    return ours_speed, bare_speed


def main() -> None:
    """Run the comparison and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round (default 8)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={Path(folder) / 'run'}", f"data.prepared_dir={folder}"]
        overrides += ["train.validate_every_steps=0", "checkpoint.every_steps=0"]
        overrides += [
            "observe.sample_tokens=0",
            "train.compute_dtype=float32",
            "train.compile=false",
        ]
        config = load_recipe("quickstart", overrides).config
        with open_run(config, World()) as run:
            ours, bare = measure(run, arguments.rounds, arguments.steps)
            run.saving.conclude(run.progress)
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    spread = statistics.stdev(ratios) / math.sqrt(len(ratios))
    print(f"\ntrainer    {statistics.median(ours):10,.0f} tokens/s (median of {len(ours)} rounds)")
    print(f"bare loop  {statistics.median(bare):10,.0f} tokens/s")
    print(f"ratio      {statistics.median(ratios):10.3f}  (median; standard error {spread:.3f})")


if __name__ == "__main__":
    main()
