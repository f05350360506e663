"""Turns a trained Transformer into a hybrid: most attention layers become Mamba-2 layers that start
from their weights (MaTVLM, arXiv 2503.13440, section 3.2; Wang et al. 2024, arXiv 2408.15237).

Without its softmax, attention is a recurrence: a state that sums K V^T and is read with Q. So
queries become C, keys B, values x and the output projection stays; a Mamba-2 head is as wide as an
attention head, its state as well, and every head has a B and a C of its own. Keys and values of
grouped-query attention are repeated for all heads, since the input projection here is that wide.
What attention has and Mamba-2 has not is lost: rotary phases, query/key norms, the softmax's
normalisation. All else, gate, steps, convolution, decay, skip and norm, starts as it usually does.

`copy+scale` goes closer to linear attention: it divides C by the root of the head width as
attention does, makes the convolution pass each position's own value, and lets every step be one and
decay by 1/e over a row. Three differences remain, which training has to find its way around: the
SiLU behind the convolution bends q, k and v; the gate, whose weights start at random, multiplies
what is read; and the norm behind it makes each head's output as large as any other's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from interlace.trainer.config.distill_section import DistillSection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.shapes import head_width, kv_heads

Start = Literal["copy+scale", "copy", "random"]
STARTS: tuple[Start, ...] = ("copy+scale", "copy", "random")

FIRST_STEP = 1.0
"""Size of all steps at the start of `copy+scale`: what a position writes counts as it is."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """A student before its training.

    Attributes:
        model: Its `[model]` table.
        weights: All parameters and buffers, fp32 on the CPU.
        kept: Numbers of the layers that kept their attention, from 0.
        replaced: Numbers of the layers that are Mamba-2 now.
    """

    model: ModelSection
    weights: dict[str, torch.Tensor]
    kept: tuple[int, ...]
    replaced: tuple[int, ...]


def hybridize(
    teacher: LanguageModel, *, every: int, start: Start, seed: int, row_length: int
) -> Hybrid:
    """Replace attention layers of a model.

    Args:
        teacher: The trained model.
        every: The last of every so many attention layers keeps its attention, so the first does
            not unless all do; 1 keeps all.
        start: How the new layers start.
        seed: Of what starts at random.
        row_length: Tokens over which `copy+scale` lets the state fade by 1/e.

    Raises:
        ConfigError: The model has no attention, or Mamba-2 layers of another shape.
    """
    config, words = teacher.config, layer_patterns(teacher.config)
    with_attention = [number for number, word in enumerate(words) if "A" in word]
    kept = tuple(with_attention[every - 1 :: every])
    replaced = tuple(number for number in with_attention if number not in kept)
    if not with_attention:
        raise ConfigError([f"model.pattern={config.pattern}: has no attention to replace"])
    model = hybrid_section(config, replaced) if replaced else config
    student = LanguageModel(model, teacher.embedding.weight.shape[0])
    student.initialise(seed)
    weights = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    old = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    weights |= {name: tensor.clone() for name, tensor in old.items() if name in weights}
    if start != "random":
        for place in attention_places(words, replaced):
            taken = mapped(old, weights, place, config, start, row_length)
            weights |= {f"{place}.{name}": tensor for name, tensor in taken.items()}
    return Hybrid(model=model, weights=weights, kept=kept, replaced=replaced)


def hybrid_section(config: ModelSection, replaced: tuple[int, ...]) -> ModelSection:
    """Return the `[model]` table of the student.

    Raises:
        ConfigError: It has Mamba-2 layers already, with heads of another shape.
    """
    words = [
        word.replace("A", "M") if number in replaced else word
        for number, word in enumerate(layer_patterns(config))
    ]
    each, inner = head_width(config), config.heads * head_width(config)
    shape = {
        "mamba_head_width": each,
        "mamba_state_width": each,
        "mamba_groups": config.heads,
        "mamba_expand": expansion(inner, config.width),
    }
    if "M" in "".join(layer_patterns(config)):
        differing = [
            f"model.{name}={getattr(config, name)}: the model has Mamba-2 layers of this shape, "
            f"and those made of its attention would need model.{name}={value}; it cannot have both"
            for name, value in shape.items()
            if getattr(config, name) != value
        ]
        if differing:
            raise ConfigError(differing)
    pattern = {"pattern": spelled(words), "layers": 1, "depth_plan": "repeat"}
    return config.model_copy(update={**shape, **pattern})


def student_recipe(config: RunConfig, hybrid: Hybrid, source: Path, name: str) -> RunConfig:
    """Return the recipe that trains a student: the teacher's, with the new layers and a distance
    from the teacher as its objective.

    Args:
        config: The teacher's recipe.
        hybrid: The student.
        source: The teacher's folder.
        name: What runs are called.
    """
    run = config.run.model_copy(
        update={"name": re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "run"}
    )
    changes: dict[str, object] = {"run": run, "model": hybrid.model}
    if hybrid.replaced:
        aim = {"objective": "distill", "z_loss": 0.0}
        changes["train"] = config.train.model_copy(update=aim)
        changes["distill"] = DistillSection(teacher=str(source.absolute()))
    return config.model_copy(update=changes)


def spelled(words: list[str]) -> str:
    """Return layers as a pattern: `MF*3 AF` for MF MF MF AF."""
    runs: list[tuple[str, int]] = []
    for word in words:
        if runs and runs[-1][0] == word:
            runs[-1] = (word, runs[-1][1] + 1)
        else:
            runs.append((word, 1))
    return " ".join(word if times == 1 else f"{word}*{times}" for word, times in runs)


def expansion(inner: int, width: int) -> float:
    """Return the `mamba_expand` that makes `width` exactly `inner`; a fraction's float may fall
    short of it and would be rounded down.
    """
    expand = inner / width
    return expand if int(expand * width) == inner else math.nextafter(expand, math.inf)


def attention_places(words: tuple[str, ...], replaced: tuple[int, ...]) -> list[str]:
    """Return where the mixers that are replaced are, as `layers.0.blocks.0.mixer`."""
    return [
        f"layers.{number}.blocks.{block}.mixer"
        for number in replaced
        for block, letter in enumerate(words[number])
        if letter == "A"
    ]


def mapped(
    old: Tensors,
    fresh: Tensors,
    place: str,
    config: ModelSection,
    start: Start,
    row_length: int,
) -> dict[str, torch.Tensor]:
    """Return what a Mamba-2 layer takes over from attention.

    Args:
        old: The teacher's parameters.
        fresh: The student's, as they usually start.
        place: Where the mixer is in both.
        config: The teacher's `[model]` table.
        start: `copy` or `copy+scale`.
        row_length: Tokens over which `copy+scale` lets the state fade by 1/e.

    Returns:
        Parameters by their names inside the mixer: the input projection, whose rows are z, x, B, C
        and dt, the output projection, and with `copy+scale` convolution and dynamics.
    """
    query, key, value = (old[f"{place}.{name}.weight"] for name in ("query", "key", "value"))
    each, heads = head_width(config), config.heads
    repeats = heads // kv_heads(config)
    key, value = (
        rows.unflatten(0, (-1, each)).repeat_interleave(repeats, 0).flatten(0, 1)
        for rows in (key, value)
    )
    inner = heads * each
    usual = fresh[f"{place}.in_proj.weight"]
    gate, steps = usual[:inner], usual[-heads:]
    taken = {"out_proj.weight": old[f"{place}.output.weight"].clone()}
    if start == "copy+scale":
        query, steps = query / math.sqrt(each), torch.zeros_like(steps)
        taken |= linear_attention(fresh, place, row_length)
    taken["in_proj.weight"] = torch.cat([gate, value, key, query, steps])
    return taken


def linear_attention(fresh: Tensors, place: str, row_length: int) -> dict[str, torch.Tensor]:
    """Return the convolution that passes each position's own value, and dynamics that take every
    position in as it is and forget slowly.
    """
    taps = torch.zeros_like(fresh[f"{place}.conv.weight"])
    taps[:, -1] = 1.0
    heads = fresh[f"{place}.dynamics.dt_bias"]
    return {
        "conv.weight": taps,
        "conv.bias": torch.zeros_like(fresh[f"{place}.conv.bias"]),
        # softplus of this is FIRST_STEP.
        "dynamics.dt_bias": torch.full_like(heads, math.log(math.expm1(FIRST_STEP))),
        "dynamics.A_log": torch.full_like(heads, -math.log(FIRST_STEP * row_length)),
    }
