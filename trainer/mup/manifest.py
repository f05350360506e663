"""The manifest: for every parameter of a recipe its role, and what muP makes of it.

A model is built without memory at the base width, at twice that, and at the recipe's own width.
Which sides of a tensor grow is seen in the first two; by how much, in the third. What is not in
the shapes, the modules declare: which matrices are outputs, which write into the residual stream,
and which are several things side by side. The result is plain data with a digest. Optimizers and
modules are handed numbers from it, checkpoints keep it, and a run whose manifest is another is
refused.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from interlace.trainer.config.clip_checks import clip_stage
from interlace.trainer.config.mup_section import Rule
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.language_model import Block
from interlace.trainer.models.mixers.attention import Attention
from interlace.trainer.models.model import MIXER_PARAMETER, Model
from interlace.trainer.models.registry import Fused, Role, RowBlocks, mixer_class
from interlace.trainer.models.shapes import head_width
from interlace.trainer.mup.scaling import Factors, Growth, Part, factors
from interlace.trainer.mup.widths import at_width, with_whole_heads
from interlace.trainer.objectives import objective_of
from interlace.trainer.rules import rule_of

MANIFEST_NAME = "mup.json"
"""File in the run folder of a run under muP."""


@dataclass(frozen=True)
class Entry:
    """One parameter, or one block of its rows.

    Attributes:
        name: Of the parameter.
        rows: Name of the block of rows; empty for a whole tensor.
        shape: Of the parameter, or of the block.
        role: Which of its sides grow, and so which rules it follows.
        fan_in: Growth of its input side since the base width; 1 where it does not grow.
        fan_out: Growth of its output side.
        factors: Multiples of what it has at the base width.
    """

    name: str
    rows: str
    shape: tuple[int, ...]
    role: Part
    fan_in: float
    fan_out: float
    factors: Factors

    @property
    def title(self) -> str:
        """Its name for people: `NAME` or `NAME[ROWS]`."""
        return f"{self.name}[{self.rows}]" if self.rows else self.name


@dataclass(frozen=True)
class Manifest:
    """All of a recipe's parameters, in the model's order.

    Attributes:
        entries: One per parameter or block of rows.
        multipliers: Forward multipliers: path of a module's attribute and its number.
    """

    entries: tuple[Entry, ...]
    multipliers: Mapping[str, float]

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[Entry]]:
        """The entries of every parameter, from its first row."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.name, []).append(entry)
        return found

    @cached_property
    def document(self) -> dict[str, Any]:
        """The manifest as JSON has it; see `manifest_from`."""
        if not self.entries:
            return {}
        entries = {
            entry.title: {
                "shape": list(entry.shape),
                "role": entry.role,
                "fan_in": entry.fan_in,
                "fan_out": entry.fan_out,
                **asdict(entry.factors),
            }
            for entry in self.entries
        }
        return {"parameters": entries, "multipliers": dict(self.multipliers)}

    @property
    def digest(self) -> str:
        """SHA-256 of the document, in hex."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()

    def rescale(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the initial value of a parameter or buffer as muP has it."""
        entries = self.by_name.get(name, ())
        if all(entry.factors.initial == 1.0 for entry in entries):
            return value
        blocks = value.split([entry.shape[0] for entry in entries])
        pairs = zip(entries, blocks, strict=True)
        return torch.cat([block * entry.factors.initial for entry, block in pairs])


UNSCALED = Manifest((), {})
"""Of a recipe without muP: nothing is multiplied with anything."""


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between the documents of two manifests, the first few of it."""
    found: list[str] = []
    for kind in ("multipliers", "parameters"):
        before, after = saved.get(kind, {}), now.get(kind, {})
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                there, here = spoken(before.get(name), after.get(name))
                found.append(f"{name}: {there}, now {here}")
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return [*found[:3], *more]


def spoken(one: object, other: object) -> tuple[str, str]:
    """Return two unequal values of documents in words: of two entries what differs."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return in_words(one), in_words(other)
    keys = [key for key in other if one.get(key) != other[key]]
    there, here = (" ".join(f"{key}={each.get(key)}" for key in keys) for each in (one, other))
    return there, here


def in_words(value: object) -> str:
    """Return a number as it is, and only whether there is an entry."""
    if value is None:
        return "nothing"
    return "something" if isinstance(value, Mapping) else str(value)


def manifest_of(config: RunConfig, vocabulary_size: int) -> Manifest:
    """Derive the manifest of a recipe; without `mup.enabled` there is nothing in it.

    Raises:
        ConfigError: The recipe has no equal at the base width, or its update rule does not say
            whether it depends on the gradient's scale.
    """
    if not config.mup.enabled:
        return UNSCALED
    model = skeleton(config, vocabulary_size)
    base_width = config.mup.base_width
    assert base_width is not None, "checked with the recipe"
    parts = parts_of(config, vocabulary_size, model)
    # How many heads share a width is no matter of growth: where the base width holds no whole ones,
    # all widths are compared with narrower heads.
    alike, _ = with_whole_heads(config, [base_width, 2 * base_width])
    grown = parts if alike is config else parts_of(alike, vocabulary_size)
    base = at_width(alike, base_width)
    at_base = parts_of(base, vocabulary_size)
    doubled = parts_of(at_width(alike, 2 * base_width), vocabulary_size)
    scale_free = is_scale_free(config)
    entries = [
        entry_of(config, each, ratios(grown[title], at_base[title], doubled[title]), scale_free)
        for title, each in parts.items()
    ]
    divided = (each.name for each in parts.values() if each.divided)
    multipliers = dict(multipliers_of(config, base, model, divided))
    return Manifest(tuple(entries), multipliers)


def skeleton(config: RunConfig, vocabulary_size: int) -> Model:
    """Return the model of a recipe without memory."""
    with torch.device("meta"):
        return objective_of(config).build(config, vocabulary_size, torch.float32)


def is_scale_free(config: RunConfig) -> bool:
    """Whether the recipe's update rule does not depend on the gradient's scale."""
    rule = rule_of(config)
    answer = getattr(rule, "scale_free", None)
    if isinstance(answer, bool):
        return answer
    raise ConfigError(
        [
            f"optimizer.rule={config.optimizer.rule}: does not say whether its update depends on "
            "the gradient's scale, which decides how muP's learning rates follow the width; give "
            "the rule `scale_free = True` (as Adam's) or False (as that of gradient descent)"
        ]
    )


@dataclass(frozen=True)
class Piece:
    """A parameter or a block of its rows at one width.

    Attributes:
        name: Of the parameter.
        rows: Name of the block, or empty.
        shape: Of the piece.
        declared: What its module says it is for.
        transposed: Rows are inputs, as in a table of embeddings.
        divided: A module divides what comes out of it by the width.
        spread_falls: Its spread at the start falls with the root of its fan-in.
    """

    name: str
    rows: str
    shape: tuple[int, ...]
    declared: Role
    transposed: bool
    divided: bool
    spread_falls: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Fan-in and fan-out; 0 for a side that it does not have."""
        if len(self.shape) == 1:
            return 0, self.shape[0]
        out, fan_in = self.shape[-2:]
        return (out, fan_in) if self.transposed else (fan_in, out)


def parts_of(
    config: RunConfig, vocabulary_size: int, model: Model | None = None
) -> dict[str, Piece]:
    """Return all pieces of a recipe's model by title. At other depths the same layers count."""
    model = model or skeleton(config, vocabulary_size)
    words = layer_patterns(config.model)
    found: dict[str, Piece] = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        inside = MIXER_PARAMETER.fullmatch(name)
        blocks: RowBlocks = ()
        if inside is not None:
            kind = mixer_class(words[int(inside["layer"])][int(inside["block"])])
            declared = kind.roles(config.model)[inside["rest"]]
            if isinstance(kind, Fused) and "row_blocks" not in config.mup.without:
                blocks = kind.row_blocks(config.model).get(inside["rest"], ())
            divided = declared == "readout" and hasattr(owner, "multiplier")
            falls = not divided
        else:
            declared = "readout" if name in model.readouts else "vector"
            divided = declared == "readout"
            falls = model.readouts.get(name) != "constant"
        table = isinstance(owner, nn.Embedding)
        for rows, shape in row_shapes(tuple(parameter.shape), blocks):
            piece = Piece(name, rows, shape, declared, table, divided, falls)
            found[f"{name}[{rows}]"] = piece
    return found


def row_shapes(shape: tuple[int, ...], blocks: RowBlocks) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every block of rows; the whole tensor where there are none."""
    if not blocks:
        yield "", shape
        return
    assert sum(rows for _, rows in blocks) == shape[0], "blocks of rows cover the tensor"
    for name, rows in blocks:
        yield name, (rows, *shape[1:])


def ratios(piece: Piece, base: Piece, doubled: Piece) -> tuple[float | None, float | None]:
    """Return the growth of fan-in and fan-out of one piece, given the same at the base width and at
    twice that; None for a side that does not grow.
    """
    sides = zip(piece.sides, base.sides, doubled.sides, strict=True)
    fan_in, fan_out = (here / one if two != one else None for here, one, two in sides)
    return fan_in, fan_out


def entry_of(
    config: RunConfig, piece: Piece, grown: tuple[float | None, float | None], scale_free: bool
) -> Entry:
    """Return the entry of one piece, given the growth of its sides."""
    mup = config.mup
    part = part_of(*(side is not None for side in grown))
    fan_in, fan_out = (1.0 if side is None else side for side in grown)
    in_block = piece.name.startswith(("layers.", "modulations.")) and mup.base_layers is not None
    depth = config.model.layers / mup.base_layers if in_block and mup.base_layers else 1.0
    growth = Growth(
        part=part,
        fan_in=fan_in,
        fan_out=fan_out,
        depth=depth,
        divided=piece.divided and part == "readout",
        spread_falls=piece.spread_falls,
    )
    found = factors(growth, scale_free, left_out(config, scale_free))
    initial = found.initial
    if piece.declared == "residual":
        # Its start falls with the root of the depth; here the block's multiplier sees to that.
        initial *= depth**0.5
    if (mup.zero_readout and growth.divided) or (mup.zero_query and is_query(piece.name)):
        initial = 0.0
    scaled = Factors(**(asdict(found) | {"initial": initial}))
    return Entry(piece.name, piece.rows, piece.shape, part, fan_in, fan_out, scaled)


def left_out(config: RunConfig, scale_free: bool) -> Sequence[Rule]:
    """Return the rules that are left out, as asked for or because they are of something else.

    A threshold follows the gradient, or the direction that is a sum of gradients. The direction of
    a rule like Adam's has one scale at all widths, and so has a threshold on it.
    """
    cut_alike = scale_free and clip_stage(config) == "update"
    return [*config.mup.without, *(["threshold"] if cut_alike else [])]


def part_of(fan_in_grows: bool, fan_out_grows: bool) -> Part:
    """Return the role that follows from which sides grow."""
    if fan_in_grows:
        return "hidden" if fan_out_grows else "readout"
    return "input" if fan_out_grows else "finite"


def is_query(name: str) -> bool:
    """Whether a parameter projects the queries of an attention block."""
    return name.endswith(".mixer.query.weight")


def multipliers_of(
    config: RunConfig, base: RunConfig, model: Model, divided: Iterable[str]
) -> Iterator[tuple[str, float]]:
    """Yield path and number of every forward multiplier.

    Args:
        config: The recipe.
        base: The same at the base width.
        model: Its model.
        divided: Names of the output matrices behind which something is divided by the width.
    """
    mup = config.mup
    narrowing = base.model.width / config.model.width
    for name in divided:
        inside = name.startswith("layers.")
        if ("router" if inside else "readout_multiplier") not in mup.without:
            owner = name.rpartition(".")[0] if inside else "norm"
            yield f"{owner}.multiplier", narrowing
    if config.model.tie_embeddings and "readout_multiplier" not in mup.without:
        yield "norm.multiplier", narrowing
    for name, module in model.named_modules():
        if isinstance(module, Block) and mup.base_layers is not None:
            yield f"{name}.multiplier", mup.base_layers / config.model.layers
        scaled = mup.grows == "head_width" and "attention_scale" not in mup.without
        if isinstance(module, Attention) and scaled:
            at_base = head_width(base.model)
            # At the base width itself this is the module's own number, to the last bit.
            yield f"{name}.score_scale", at_base / module.head_width / math.sqrt(at_base)
