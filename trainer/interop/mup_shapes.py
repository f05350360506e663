"""To and from the `mup` package: what it says of a model's parameters, and its base-shape files.

`mup` (Yang et al. 2022, arXiv 2203.03466; package 1.0.0) hangs an `infshape` on every parameter:
its size, and its size at the base width for sides that grow. `manifest_of_mup` reads these into a
manifest, which then serves where attributes of parameters do not last (sharding, copies,
`to_empty`). `write_base_shapes` goes the other way: it writes the file from which
`mup.set_base_shapes` prepares a model of the same parameter names.

The rules of a manifest are ours: those of `mup`, but where it has none (epsilon, thresholds) or
where its own would let a wide model drift. `tests/trainer/mup/test_oracle.py` lists every
difference. Tensors whose rows grow differently have one line in a base-shape file, so their blocks
are lost there.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from torch import nn

from interlace.trainer.config.mup_section import Rule
from interlace.trainer.errors import ConfigError
from interlace.trainer.mup.manifest import Entry, Manifest, part_of
from interlace.trainer.mup.scaling import Growth, factors

INSTALL = "pip install --no-deps mup==1.0.0 pyyaml"

BaseShape = list[int | None]
"""Per side the size at the base width, or None for a side that does not grow."""

HEAD = """\
# Base shapes for mup.set_base_shapes: per side of a parameter its size at the base width, or null
# for a side that does not grow.
"""


@runtime_checkable
class Readout(Protocol):
    """An output matrix of `mup`, which divides its input by the growth of the width."""

    output_mult: float
    weight: nn.Parameter

    def width_mult(self) -> float:
        """Return the growth of the width."""
        ...


class Side(Protocol):
    """One side of a parameter as `mup` describes it."""

    base_dim: int | None
    dim: int


def manifest_of_mup(
    model: nn.Module, *, scale_free: bool = True, without: Collection[Rule] = ()
) -> Manifest:
    """Read a model that `mup.set_base_shapes` has prepared into a manifest.

    Args:
        model: Every parameter has an `infshape`.
        scale_free: Whether it is trained with a rule like Adam's, or with one like gradient descent
            (see `UpdateRule.scale_free`).
        without: Rules to leave out; `["epsilon"]` keeps epsilon as it is everywhere, as `mup` does.

    Returns:
        An entry for every parameter. `initial` is what `set_base_shapes` multiplies the parameter
        with, if torch's own start falls with the root of the fan-in. A multiplier `NAME.multiplier`
        for every `MuReadout`: what it multiplies its input with.

    Raises:
        ConfigError: A parameter has no `infshape`, or more than two of its sides grow.
    """
    owners = dict(owners_of(model))
    readouts = {name: each for name, each in model.named_modules() if isinstance(each, Readout)}
    divided = {id(each.weight) for each in readouts.values()}
    entries: list[Entry] = []
    for name, parameter in model.named_parameters():
        sides = sides_of(name, getattr(parameter, "infshape", None))
        growths = [side.dim / side.base_dim if side.base_dim else None for side in sides]
        if len(growths) == 1:
            fan_in, fan_out = None, growths[0]
        else:
            fan_out, fan_in = growths[-2:]
        if isinstance(owners[name], nn.Embedding):
            # A table of embeddings (V, D): its rows are inputs.
            fan_in, fan_out = fan_out, fan_in
        part = part_of(fan_in is not None, fan_out is not None)
        growth = Growth(
            part=part,
            fan_in=fan_in or 1.0,
            fan_out=fan_out or 1.0,
            divided=part == "readout" and id(parameter) in divided,
        )
        found = factors(growth, scale_free, without)
        shape = tuple(side.dim for side in sides)
        entries.append(Entry(name, "", shape, part, growth.fan_in, growth.fan_out, found))
    multipliers = {
        f"{name}.multiplier".lstrip("."): each.output_mult / each.width_mult()
        for name, each in readouts.items()
    }
    return Manifest(tuple(entries), multipliers)


def owners_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every parameter, once each, as `named_parameters` does."""
    for name, _ in model.named_parameters():
        yield name, model.get_submodule(name.rpartition(".")[0])


def sides_of(name: str, infshape: object) -> Sequence[Side]:
    """Return the sides of a parameter that `mup` has seen.

    Raises:
        ConfigError: It has not seen the parameter, or more than two of its sides grow.
    """
    if infshape is None:
        raise ConfigError(
            [
                f"{name}: has no infshape, so mup.set_base_shapes has not seen it, or it was lost "
                "since (by a copy, to_empty or sharding); call mup.set_base_shapes(model, ...) "
                "on the plain model first"
            ]
        )
    sides = cast(Sequence[Side], infshape)
    grows = [each for each in sides if each.base_dim is not None]
    stacked = [each for each in sides[:-2] if each.base_dim is not None]
    if len(grows) > 2 or stacked:
        raise ConfigError(
            [
                f"{name}: {len(grows)} of its sides grow, of which {len(stacked)} before the last "
                "two; a matrix is (..., out, in), and what is stacked in front does not grow"
            ]
        )
    return sides


def base_shapes_of(manifest: Manifest, model: nn.Module) -> dict[str, BaseShape]:
    """Return what a base-shape file says of every parameter.

    Args:
        manifest: Of the model.
        model: Says which parameters are tables of embeddings, whose rows are inputs; it may be
            without memory.

    Raises:
        ConfigError: The manifest is of another model.
    """
    owners = dict(owners_of(model))
    if list(owners) != list(manifest.by_name):
        strange = sorted({*owners} ^ {*manifest.by_name})
        raise ConfigError(
            [
                f"the manifest is not of this model: {', '.join(strange[:3]) or 'the order'} "
                "differs; use manifest_of(config, vocabulary_size) of the model's own recipe"
            ]
        )
    return {
        name: base_shape(entries, isinstance(owners[name], nn.Embedding))
        for name, entries in manifest.by_name.items()
    }


def base_shape(entries: Sequence[Entry], table: bool) -> BaseShape:
    """Return the base sizes of one parameter, given its entry or those of its blocks of rows."""
    first = entries[0]
    found: BaseShape = [None] * len(first.shape)
    if len(first.shape) == 1:
        inputs, outputs = None, 0
    else:
        inputs, outputs = len(first.shape) - 1, len(first.shape) - 2
    if table:
        assert inputs is not None, "tables have two sides"
        inputs, outputs = outputs, inputs
    if inputs is not None and first.role in {"hidden", "readout"}:
        found[inputs] = round(first.shape[inputs] / first.fan_in)
    if any(each.role in {"hidden", "input"} for each in entries):
        # Blocks of rows lie along the outputs; those that do not grow count as they are.
        found[outputs] = round(sum(each.shape[outputs] / each.fan_out for each in entries))
    return found


def write_base_shapes(manifest: Manifest, model: nn.Module, path: Path) -> None:
    """Write the base-shape file (.bsh) for `mup.set_base_shapes(model, str(path))`.

    Args:
        manifest: Of the model.
        model: Of the same parameter names; it may be without memory.
        path: The file.

    Raises:
        ConfigError: The manifest is of another model, or pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            [f"{path}: base-shape files are YAML, and pyyaml is not installed; type {INSTALL}"]
        ) from error
    shapes = base_shapes_of(manifest, model)
    path.write_text(HEAD + yaml.safe_dump(shapes, indent=4, sort_keys=True), encoding="utf-8")
