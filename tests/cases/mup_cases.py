"""Recipes of every family at four times the width that their settings are carried over from, and a
byte-level Transformer as a user of the `mup` package would write it.
"""

from types import SimpleNamespace
from typing import Any

import mup
import torch
from torch import nn

from interlace.offload.hardware import load_profile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.schedule import NOTHING_HIDDEN
from interlace.trainer.config.checks import validate
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.mup.parametrise import built
from interlace.trainer.mup.widths import at_width
from interlace.trainer.optimizer import build_optimizer

BASE, WIDTH, VOCABULARY = 32, 128, 257

MAMBA = {"mamba_head_width": 8, "mamba_state_width": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {"model": {"kv_heads": 8}},
    "one key head": {"model": {"kv_heads": 1}},
    "tied": {"model": {"tie_embeddings": True}},
    "wide heads": {"model": {"heads": 4}, "mup": {"grows": "head_width"}},
    "normed wide heads": {
        "model": {"heads": 4, "query_key_norm": True},
        "mup": {"grows": "head_width"},
    },
    "hybrid": {"model": {"pattern": "MF AF", "layers": 1, **MAMBA}},
    "experts": {
        "model": {
            "pattern": "AE",
            "moe_experts": 4,
            "moe_expert_width": 64,
            "moe_shared_experts": 1,
        }
    },
    "energy": {"train": {"objective": "energy"}},
    "energy, adaln": {"train": {"objective": "energy"}, "energy": {"variant": "adaln"}},
}
"""What differs from a Transformer of two layers with 16 heads of 8."""

SHAPE = {"pattern": "AF", "layers": 2, "width": WIDTH, "heads": 16, "ffn_width": 256}


def recipe(family: str = "transformer", **tables: dict[str, Any]) -> RunConfig:
    """Return the checked recipe of a family, with settings that win over its own by table."""
    own = FAMILIES[family]
    merged: dict[str, dict[str, Any]] = {
        "model": {**SHAPE},
        "mup": {"enabled": True, "base_width": BASE},
        "data": {"sequence_length": 32},
    }
    for each in (own, tables):
        for name, settings in each.items():
            merged[name] = {**merged.get(name, {}), **settings}
    return validate(merged)


class Gain(nn.Module):
    """A norm's gain; what it does is of no interest here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Twin(nn.Module):
    """The parameters of our Transformer, under our names, in torch's and mup's own modules."""

    def __init__(self, config: RunConfig, *, tied: bool = False) -> None:
        super().__init__()
        model = config.model
        width, head_width = model.width, model.width // model.heads
        keys, wide = head_width * (model.kv_heads or model.heads), model.ffn_width
        assert wide is not None
        mixers = {
            "A": {
                "query": (width, width),
                "key": (width, keys),
                "value": (width, keys),
                "output": (width, width),
            },
            "F": {"gate": (width, wide), "up": (width, wide), "down": (wide, width)},
        }
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList()
        for _ in range(model.layers):
            layer = nn.Module()
            layer.blocks = nn.ModuleList()
            for letter in "AF":
                block = nn.Module()
                block.norm = Gain(width)
                block.mixer = nn.ModuleDict(
                    {name: nn.Linear(*size, bias=False) for name, size in mixers[letter].items()}
                )
                layer.blocks.append(block)
            self.layers.append(layer)
        self.norm = Gain(width)
        if tied:
            self.head = mup.MuSharedReadout(self.embedding.weight, bias=False)
        else:
            self.head = mup.MuReadout(width, VOCABULARY, bias=False)


def twin_of(config: RunConfig, width: int | None = None, *, tied: bool = False) -> Twin:
    """Return the twin of a recipe's model, at another width."""
    return Twin(config if width is None else at_width(config, width), tied=tied)


def model_of(
    config: RunConfig, dtype: torch.dtype = torch.float64, *, spread: float = 0.0
) -> Model:
    """Return a recipe's model with its multipliers and its start, and noise on every weight, so
    that none of them is without effect.
    """
    with torch.device("meta"):
        model = built(config, VOCABULARY, dtype)
    model = model.to(dtype).to_empty(device="cpu")
    model.initialise(config.run.seed, manifest_of(config, VOCABULARY).rescale)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(spread * noise.to(dtype))
    return model.eval()


def optimizer_of(model: Model, config: RunConfig) -> OffloadedOptimizer:
    """Return the optimizer that a run of the recipe has, with all state on the device."""
    placement = SimpleNamespace(
        device_budget_bytes=10**9,
        host_budget_bytes=10**9,
        overlap="none",
        hidden_window=NOTHING_HIDDEN,
    )
    plan = SimpleNamespace(offload=placement, accumulation=1)
    manifest = manifest_of(config, VOCABULARY)
    return build_optimizer(model, config, plan, load_profile("4xh100-pcie5"), manifest)
