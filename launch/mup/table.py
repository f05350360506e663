"""`interlace mup table`: every parameter of a recipe under muP, as a page or as JSON."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from interlace.launch.mup.rows import Row, multiplier_rows, rows_of
from interlace.launch.plan_table import expected_vocabulary
from interlace.launch.typeset import typeset
from interlace.trainer.config.load import Recipe, load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.mup.manifest import Manifest, is_scale_free, manifest_of, skeleton

Cells = list[str]


@dataclass(frozen=True)
class View:
    """What is shown.

    Attributes:
        recipe: As loaded, with muP on.
        assumed: Settings that the recipe itself does not have.
        manifest: Of the recipe.
        rows: Of its parameters.
        multipliers: Path, count and number of forward multipliers.
    """

    recipe: Recipe
    assumed: Sequence[str]
    manifest: Manifest
    rows: Sequence[Row]
    multipliers: Sequence[tuple[str, int, float]]


def table(arguments: Namespace) -> int:
    """Show what muP makes of every parameter.

    Raises:
        ConfigError: The recipe is wrong, or has no equal at the base width.
    """
    recipe, assumed = recipe_under_mup(arguments)
    vocabulary = expected_vocabulary(recipe.config)
    manifest = manifest_of(recipe.config, vocabulary)
    fold = not arguments.all
    model = skeleton(recipe.config, vocabulary)
    rows = rows_of(recipe.config, model, manifest, fold=fold)
    multipliers = multiplier_rows(manifest.multipliers, fold=fold)
    view = View(recipe, assumed, manifest, rows, multipliers)
    print(json.dumps(document(view), indent=2) if arguments.json else page(view))
    return 0


def recipe_under_mup(arguments: Namespace) -> tuple[Recipe, list[str]]:
    """Return the recipe with muP on, and the settings under `[mup]` that it does not have by
    itself.
    """
    width = arguments.base_width
    base = [] if width is None else [f"mup.base_width={width}"]
    asked = load_recipe(arguments.recipe, [*arguments.overrides, *base])
    mup = asked.config.mup
    assumed = [*([] if mup.enabled else ["mup.enabled=true"]), *base]
    if mup.base_width is None:
        assumed.append(f"mup.base_width={asked.config.model.width}")
    return load_recipe(arguments.recipe, [*arguments.overrides, *assumed]), assumed


def document(view: View) -> dict[str, object]:
    """Return the table as JSON has it."""
    config = view.recipe.config
    return {
        "recipe": view.recipe.name,
        "assumed": list(view.assumed),
        "base_width": config.mup.base_width,
        "width": config.model.width,
        "base_layers": config.mup.base_layers,
        "layers": config.model.layers,
        "rule": config.optimizer.rule,
        "scale_free": is_scale_free(config),
        "peak_lr": config.optimizer.peak_lr,
        "without": list(config.mup.without),
        "digest": view.manifest.digest,
        "parameters": [row.document for row in view.rows],
        "multipliers": [
            {"name": name, "count": count, "value": value}
            for name, count, value in view.multipliers
        ],
    }


def page(view: View) -> str:
    """Return the table as a page of text."""
    recipe = view.recipe
    lines = [f"{recipe.name}: {recipe.description}".rstrip(": "), *facts(view), ""]
    lines += parameter_lines(view.rows)
    lines += ["", *multiplier_lines(view)]
    return "\n".join(lines)


def facts(view: View) -> list[str]:
    """Return what holds for all rows."""
    config, mup = view.recipe.config, view.recipe.config.mup
    assert mup.base_width is not None, "checked with the recipe"
    lines = [f"  width      {growth(config.model.width, mup.base_width)}"]
    if mup.base_layers is not None:
        lines.append(f"  layers     {growth(config.model.layers, mup.base_layers)}")
    lines.append(f"  rates      {rates_in_words(config)}")
    if config.coordinate_clip.policy != "fixed":
        lines.append(
            f"  threshold  coordinate_clip.policy={config.coordinate_clip.policy} finds it while "
            "training"
        )
    if mup.without:
        lines.append(f"  left out   {', '.join(mup.without)}")
    lines.append(f"  manifest   {view.manifest.digest}")
    if view.assumed:
        lines.append(
            f"  assumed    the recipe is not trained so: shown as with {' '.join(view.assumed)}"
        )
    return lines


def growth(here: int, base: int) -> str:
    """Return a size and its base in words."""
    if here == base:
        return f"{here:,}, which is the base itself"
    return f"{here:,}, {here / base:g} times the base of {base:,}"


def rates_in_words(config: RunConfig) -> str:
    """Return which table of rates holds, and why."""
    rule, peak = config.optimizer.rule, f"{config.optimizer.peak_lr:g}"
    if is_scale_free(config):
        table = "Adam's table, as its update does not depend on the gradient's scale"
    else:
        table = "the table of gradient descent, as its update is as long as the gradient"
    return f"{rule}, {peak} at the base; {table}"


def parameter_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of parameters: a line for every block, and under it its rows."""
    columns = list(columns_of(rows))
    head = ["parameter", "shape", "role", "in", "out"]
    left = [0]
    for title, _, _ in columns:
        head += [title, ""]
        left.append(len(head) - 1)
    found: list[Cells] = []
    for (prefix, count), group in groupby(rows, key=place):
        if prefix:
            found.append([f"{prefix}  x{count}" if count > 1 else prefix])
        for row in group:
            name = f"  {row.title.removeprefix(prefix + '.')}" if prefix else row.title
            cells = [name, "x".join(map(str, row.entry.shape)), row.entry.role]
            cells += [f"{row.entry.fan_in:g}", f"{row.entry.fan_out:g}"]
            for _, value, factor in columns:
                cells += [number(value(row)), times(factor(row))]
            found.append(cells)
    return typeset(head, found, left)


def place(row: Row) -> tuple[str, int]:
    """Return the layer and block that a row belongs to, and how many there are."""
    parts = row.name.split(".")
    return (".".join(parts[:4]) if parts[0] == "layers" else "", row.count)


Column = tuple[str, Callable[[Row], float | None], Callable[[Row], float]]
"""Title, value and factor."""


def columns_of(rows: Sequence[Row]) -> Iterator[Column]:
    """Yield the columns that there is anything to say in."""
    yield "start", lambda row: row.start, lambda row: row.entry.factors.initial
    yield "rate", lambda row: row.lr, lambda row: row.entry.factors.lr
    yield (
        "decay",
        lambda row: row.weight_decay,
        lambda row: row.entry.factors.weight_decay if row.weight_decay else 1.0,
    )
    if any(row.eps is not None for row in rows):
        yield "epsilon", lambda row: row.eps, lambda row: row.entry.factors.eps
    if any(row.threshold is not None for row in rows):
        yield "threshold", lambda row: row.threshold, lambda row: row.entry.factors.threshold


def number(value: float | None) -> str:
    """Return a number in three digits, or a dash for none."""
    return "-" if not value else f"{value:.3g}"


def times(factor: float) -> str:
    """Return a factor; nothing for 1."""
    return "" if factor == 1.0 else f"x{factor:.3g}"


def multiplier_lines(view: View) -> list[str]:
    """Return the table of forward multipliers."""
    if not view.multipliers:
        return ["No module multiplies anything."]
    rows = [
        [f"{name}  x{count}" if count > 1 else name, f"{value:.4g}"]
        for name, count, value in view.multipliers
    ]
    return typeset(["multiplier in a module", "value"], rows)
