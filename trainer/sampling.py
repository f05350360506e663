"""Text from a model, token by token, with a cache of keys and values.

The prompt opens with the end-of-text token, as every document does in training, and sampling ends
at the next one. Positions beyond the trained sequence length simply continue; quality falls there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from interlace.trainer.models.model import Model


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn.

    Attributes:
        max_tokens: Most tokens to draw.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw among this many likeliest tokens; 0 among all.
        seed: Fixes the draws.
    """

    max_tokens: int
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0


@torch.no_grad()
def generate(
    model: Model, prompt: Sequence[int], end_of_text: int, settings: SamplingSettings
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, up to the end of text or `max_tokens`."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.tensor([[end_of_text, *prompt]], dtype=torch.int64, device=device)
    caches = model.new_caches(1, tokens.shape[1] + settings.max_tokens)
    for _ in range(settings.max_tokens):
        logits = model.logits(tokens, caches, last_only=True)[0, 0].cpu()
        token = draw(logits, settings, generator)
        if token == end_of_text:
            return
        yield token
        tokens = torch.tensor([[token]], dtype=torch.int64, device=device)


def draw(logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator) -> int:
    """Return one id drawn from logits (V,)."""
    if settings.temperature == 0.0:
        return int(logits.argmax())
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.numel():
        lowest = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
