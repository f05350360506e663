"""What is run over in `benchmarks/versus_deepspeed.py`: models, batches, and the tokens.

Tokens follow a chain: each has one successor that comes four times in five, so that a model learns
within fifty steps and a wrong update shows in its loss.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from interlace.trainer.config import load_recipe
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers

LIKELY = 0.8
"""Probability of a token's one successor."""

DEVICE_SHARE = 0.4
"""Bytes on the device that state may occupy, as a share of all state in float32."""

STATE_BYTES = 12
"""Of one parameter under AdamW: master weight and two moments."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One model and the batches that it is trained on.

    Attributes:
        name: As it is typed.
        recipe: Whose model it is.
        words: Overrides of the recipe.
        vocabulary: Tokens there are.
        length: Tokens of a row.
        rows: Micro-batches to measure, in rows of one rank; a step is one micro-batch.
        steps: After how many steps losses must agree; 0 where those of the small model count.
        recomputes: Whether layers are recomputed in backward.
        bf16: Whether to compute in bfloat16.
        lr: Learning rate of AdamW.
        sgd_lr: Of clipped SGD.
        block: Iterations with updates that are timed together.
        limit: Seconds after which a contender counts as hanging.
    """

    name: str
    recipe: str
    words: tuple[str, ...] = ()
    vocabulary: int = 32768
    length: int = 2048
    rows: tuple[int, ...] = (1, 8)
    steps: int = 0
    recomputes: bool = True
    bf16: bool = True
    lr: float = 1e-4
    sgd_lr: float = 0.1
    block: int = 4
    limit: float = 150.0

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def model(self, device: torch.device) -> LanguageModel:
        """Return the model with weights that are the same for everyone and on every rank."""
        section = load_recipe(self.recipe, list(self.words)).config.model
        with torch.device("meta"):
            model = LanguageModel(section, self.vocabulary, self.dtype).to(self.dtype)
        if self.recomputes:
            recompute_layers(list(model.layers), "block")
        model.to_empty(device=device)
        # Where they are drawn does not matter; on the host large models would take minutes.
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
        return model

    def tokens(self, step: int, rank: int, rows: int) -> torch.Tensor:
        """Return the rows of one step, (rows, length + 1) int64 on the CPU."""
        generator = torch.Generator().manual_seed(1)
        successor = torch.randperm(self.vocabulary, generator=generator)
        generator.manual_seed(1_000_003 * (step + 1) + rank)
        shape = (rows, self.length + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        follows = torch.rand(shape, generator=generator) < LIKELY
        for place in range(1, self.length + 1):
            before = successor[tokens[:, place - 1]]
            tokens[:, place] = torch.where(follows[:, place], before, tokens[:, place])
        return tokens


SMALL_WORDS = (
    "model.layers=3",
    "model.width=192",
    "model.heads=3",
    "model.kv_heads=3",
    "model.ffn_width=512",
)

SMALL = Track(
    name="small",
    recipe="quickstart",
    words=SMALL_WORDS,
    vocabulary=128,
    length=64,
    rows=(1, 4),
    steps=50,
    recomputes=False,
    bf16=False,
    lr=1e-3,
    sgd_lr=0.3,
    block=8,
)
"""1.4 million parameters, for a machine without a GPU; and what losses are compared on with one:
rounding is amplified by training, so that those of large models would agree with nobody's.
"""

TINY = replace(
    SMALL,
    name="tiny",
    words=("model.layers=1", "model.width=32", "model.heads=2", "model.ffn_width=64"),
    length=16,
    rows=(1, 2),
    steps=3,
    block=2,
)
"""Seconds of work, to see whether everything runs."""

TRACKS: tuple[Track, ...] = (
    TINY,
    SMALL,
    Track(name="1.3B", recipe="gpt_1b_offload"),
    Track(name="7B", recipe="gpt_7b_offload", limit=300.0),
)


def track_of(name: str) -> Track:
    """Return the track of a name.

    Raises:
        ValueError: There is none; the message lists those that are.
    """
    for track in TRACKS:
        if track.name == name:
            return track
    raise ValueError(f"no model is called {name}; there are: {', '.join(t.name for t in TRACKS)}")
