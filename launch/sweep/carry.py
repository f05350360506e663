"""The winner, written into a recipe for a larger model, with how far that goes beyond the sweep.

A sweep certifies one axis: the width, between its narrowest and its widest model. Whatever else
differs between its trials and the target is named with its factor: depth (Dey et al. 2025, arXiv
2505.01618), training tokens, for the best learning rate falls with them also under muP (Bjorck et
al. 2024, arXiv 2409.19913), and batch.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from interlace.launch.sweep.judging import Judged
from interlace.launch.sweep.progress import power
from interlace.launch.sweep.trials import Space, Tables, learning_rate
from interlace.trainer.config.clip_checks import largest_norm
from interlace.trainer.config.load import find_recipe, load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import head_width
from interlace.trainer.mup.widths import at_width
from interlace.trainer.rules import rule_of
from interlace.trainer.run_folder import write_atomically

HORIZON_EXPONENT = 0.32
"""The best learning rate falls as tokens to this power, as reported for AdamW."""

CARRIED = ("optimizer", "coordinate_clip", "mup")
KEPT = (("optimizer", "warmup_steps"),)
"""Settings that belong to the target's own horizon."""


@dataclass(frozen=True)
class Axis:
    """One way in which the target is not what was swept.

    Attributes:
        name: What differs.
        swept: What the trials had.
        target: What the target has.
        factor: How many times more that is, where it can be counted.
        warning: What that means; empty where the sweep certifies it.
    """

    name: str
    swept: str
    target: str
    factor: float | None
    warning: str


@dataclass(frozen=True)
class Carried:
    """A recipe that was written for a target.

    Attributes:
        path: The file.
        target: Recipe that it extends.
        lr: Its `optimizer.peak_lr`.
        passed: Whether the sweep found that the learning rate transfers.
        axes: How far it goes beyond the sweep.
    """

    path: Path
    target: str
    lr: float
    passed: bool
    axes: tuple[Axis, ...]

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {"path": os.fspath(self.path)}

    def page(self) -> str:
        """Return it in words."""
        lines = [f"{self.path}: {self.target} with optimizer.peak_lr={self.lr:g}"]
        if not self.passed:
            lines.append("  the sweep did not find that the learning rate transfers: take care")
        return "\n".join([*lines, *(f"  {text}" for text in axis_lines(self.axes))])


def axis_lines(axes: Sequence[Axis]) -> list[str]:
    """Return a line per axis."""
    return [
        f"{axis.name}: {axis.swept} -> {axis.target}"
        + (f", {axis.factor:.4g} x" if axis.factor is not None else "")
        + (f"; {axis.warning}" if axis.warning else "; certified")
        for axis in axes
    ]


def check_target(space: Space, target: str) -> None:
    """Raise `ConfigError` if the winner of a sweep could not be carried to a recipe."""
    for settings, config in space.configs.items():
        rate = learning_rate(space.request.ladder.grid[0])
        tables = carried_tables(config, settings, space.base_width, rate)
        try:
            load_recipe(target, overrides_of(tables))
        except ConfigError as error:
            problems = [f"--transfer-to {target}: {text}" for text in error.problems]
            raise ConfigError(problems) from None


def overrides_of(tables: Tables) -> list[str]:
    """Return tables as `section.key=value` words, values as TOML."""
    return [
        f"{section}.{line.replace(' = ', '=', 1)}"
        for section, values in tables.items()
        for key, value in values.items()
        for line in [tomli_w.dumps({key: value}).strip().replace("\n", "")]
    ]


def carried_tables(
    config: RunConfig, settings: Sequence[str], base_width: int, lr: float
) -> Tables:
    """Return what a target takes from the recipe of a sweep.

    Args:
        config: Recipe of the winner.
        settings: Further settings that were swept.
        base_width: Width whose learning rate is meant.
        lr: Learning rate at that width.
    """
    whole: Tables = config.model_dump(exclude_none=True)
    tables: Tables = {
        section: {key: value for key, value in whole[section].items() if (section, key) not in KEPT}
        for section in CARRIED
    }
    for word in settings:
        section, _, key = word.partition("=")[0].partition(".")
        if key in whole[section]:
            tables.setdefault(section, {})[key] = whole[section][key]
    tables["optimizer"]["peak_lr"] = lr
    # What the sweep left unset holds as well, whatever the target says.
    tables["optimizer"]["weight_decay"] = rule_of(config).hyperparameters()["weight_decay"]
    tables["optimizer"]["clip"] = largest_norm(config) or 0.0
    tables["mup"] |= {"enabled": True, "base_width": base_width}
    return tables


def carry(space: Space, best: Judged, target: str, folder: Path) -> Carried:
    """Write the winner's recipe for a target.

    Args:
        space: What was swept.
        best: The winner; every width of it has an optimum.
        target: Recipe that is extended.
        folder: Where the file goes.
    """
    assert best.transfer is not None, "a winner has optima"
    optimum = best.transfer.optima[-1]
    assert optimum.log2_lr is not None, "an optimum at an edge is never carried anywhere"
    settings = best.family.settings
    lr = float(f"{2.0**optimum.log2_lr:.4g}")
    tables = carried_tables(space.configs[settings], settings, space.base_width, lr)
    target_path = find_recipe(target)
    named = target_path.stem if not ("/" in target or target.endswith(".toml")) else None
    document = {
        "description": f"{target_path.stem} with what a sweep of {space.request.recipe} found",
        "extends": named or os.fspath(target_path.absolute()),
        **tables,
    }
    axes = axes_between(space, best, load_recipe(target).config)
    stem = Path(space.request.recipe).stem
    path = folder / f"{target_path.stem}-from-{stem}.toml"
    widths = ", ".join(map(str, space.request.widths))
    head = [
        f"Learning rate: optimum at width {optimum.width}, {power(round(optimum.log2_lr, 2))}, of "
        f"a sweep of widths {widths}.",
        f"Verdict: {best.verdict}. How far this goes beyond the sweep:",
        *axis_lines(axes),
    ]
    text = "".join(f"# {line}\n" for line in head) + "\n" + tomli_w.dumps(document)
    write_atomically(path, text)
    return Carried(path, target, lr, best.passes, axes)


def axes_between(space: Space, best: Judged, target: RunConfig) -> tuple[Axis, ...]:
    """Return every axis on which a target differs from the trials of a winner."""
    swept = space.configs[best.family.settings]
    widest = space.request.widths[-1]
    model, wide = target.model, at_width(swept, widest).model
    axes = [width_axis(space.request.widths, model.width)]
    depth = "the sweep says nothing about depth"
    if swept.mup.base_layers is not None:
        depth = "rates follow the depth as CompleteP says; this sweep has not tried it"
    tokens = tokens_of(target) / tokens_of(swept)
    horizon = (
        "the best learning rate falls with the tokens also under muP: as their number to the "
        f"power of -{HORIZON_EXPONENT} it would be {tokens**-HORIZON_EXPONENT:.2g} times as large"
    )
    batch = target.train.tokens_per_step / swept.train.tokens_per_step
    batches = f"with the root of the batch it would be {batch**0.5:.2g} times as large (AdamW)"
    counted = (
        ("layers", swept.model.layers, model.layers, depth),
        ("training tokens", tokens_of(swept), tokens_of(target), horizon),
        ("tokens per step", swept.train.tokens_per_step, target.train.tokens_per_step, batches),
        (
            "sequence length",
            swept.data.sequence_length,
            target.data.sequence_length,
            "the sweep says nothing about longer rows",
        ),
        ("head width", head_width(wide), head_width(model), "the sweep has not tried it"),
    )
    axes += [
        Axis(name, f"{old:,}", f"{new:,}", new / old, warning)
        for name, old, new, warning in counted
        if new != old
    ]
    named = (
        ("pattern", str(swept.model.pattern), str(model.pattern)),
        ("objective", swept.train.objective, target.train.objective),
        ("tokenizer", swept.data.tokenizer, target.data.tokenizer),
    )
    axes += [
        Axis(name, old, new, None, "the sweep says nothing about another one")
        for name, old, new in named
        if new != old
    ]
    return tuple(axes)


def tokens_of(config: RunConfig) -> int:
    """Return the training tokens of a whole run."""
    return config.train.steps * config.train.tokens_per_step


def width_axis(widths: Sequence[int], target: int) -> Axis:
    """Return how far the target's width is beyond the widest that was tried."""
    span = f"{widths[0]} to {widths[-1]}"
    if widths[0] <= target <= widths[-1]:
        return Axis("width", span, str(target), None, "")
    factor = target / widths[-1]
    certified = widths[-1] / widths[0]
    warning = f"beyond the {certified:.4g} x in width that were tried"
    return Axis("width", span, f"{target:,}", factor, warning)
