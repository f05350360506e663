"""What `interlace mup table` says of a parameter, as numbers; equal rows of layers are one.

Everything is read off the same manifest and the same groups that a run is built with.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Entry, Manifest
from interlace.trainer.optimizer import group_of
from interlace.trainer.rules import rule_of

LAYER = re.compile(r"^(layers|modulations)\.\d+\.")
MOST_DRAWN = 2**18
"""Initial values that are drawn to see their spread, at most, but for one row."""


@dataclass(frozen=True)
class Row:
    """One parameter, or one block of its rows, or all that are equal to it in other layers.

    Attributes:
        name: Of the parameter; with a star in place of the layer where several are one.
        count: How many it stands for.
        entry: Of the manifest.
        start: Standard deviation of the initial values.
        lr: Learning rate at the peak.
        weight_decay: Decay.
        eps: Adam's epsilon; None for a rule that has none.
        threshold: Threshold of a coordinate; None where nothing is clipped, or at learnt ones.
    """

    name: str
    count: int
    entry: Entry
    start: float
    lr: float
    weight_decay: float
    eps: float | None
    threshold: float | None

    @property
    def title(self) -> str:
        """Name and block of rows."""
        return f"{self.name}[{self.entry.rows}]" if self.entry.rows else self.name

    @property
    def document(self) -> dict[str, Any]:
        """The row as JSON has it: numbers, and `factors` on what they are at the base width."""
        entry = self.entry
        return {
            "name": self.name,
            "rows": entry.rows,
            "count": self.count,
            "shape": list(entry.shape),
            "role": entry.role,
            "fan_in": entry.fan_in,
            "fan_out": entry.fan_out,
            "start": self.start,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "eps": self.eps,
            "threshold": self.threshold,
            "factors": asdict(entry.factors),
        }


def rows_of(config: RunConfig, model: Model, manifest: Manifest, *, fold: bool) -> list[Row]:
    """Return a row for every entry of a manifest.

    Args:
        config: The recipe.
        model: Its model, without memory.
        manifest: Its manifest.
        fold: Let equal rows of several layers be one.
    """
    hyper = rule_of(config).hyperparameters()
    if config.coordinate_clip.policy != "fixed":
        hyper.pop("threshold", None)
    names = [starred(entry.name) if fold else entry.name for entry in manifest.entries]
    found: dict[object, Row] = {}
    for name, entry in zip(names, manifest.entries, strict=True):
        key = (name, entry.rows, replace(entry, name=name))
        if key in found:
            found[key] = replace(found[key], count=found[key].count + 1)
        else:
            found[key] = row_of(entry, config, model, hyper)
    return [
        replace(row, name=starred(row.name)) if row.count > 1 else row for row in found.values()
    ]


def starred(name: str) -> str:
    """Return a name with a star in place of the number of its layer."""
    return LAYER.sub(r"\1.*.", name)


def row_of(entry: Entry, config: RunConfig, model: Model, hyper: Mapping[str, Any]) -> Row:
    """Return the row of one entry."""
    own = model.rate_factors.get(entry.name)
    decays = own is None and len(entry.shape) >= 2
    group = group_of(hyper, entry.factors, own or 1.0, decays=decays)
    return Row(
        name=entry.name,
        count=1,
        entry=entry,
        start=spread(entry, config, model),
        lr=group["lr"],
        weight_decay=group.get("weight_decay", 0.0),
        eps=group.get("eps"),
        threshold=group.get("threshold"),
    )


def spread(entry: Entry, config: RunConfig, model: Model) -> float:
    """Return the standard deviation of the initial values, of a part of the rows where there are
    many.
    """
    first, *rest = entry.shape
    most = max(1, MOST_DRAWN // math.prod(rest))
    value = model.initial_value(entry.name, (min(first, most), *rest), config.run.seed)
    return float(value.double().std(correction=0)) * entry.factors.initial


def multiplier_rows(
    multipliers: Mapping[str, float], *, fold: bool
) -> list[tuple[str, int, float]]:
    """Return path, count and number of the forward multipliers."""
    found: dict[tuple[str, float], list[str]] = {}
    for path, number in multipliers.items():
        found.setdefault((starred(path) if fold else path, number), []).append(path)
    return [
        (name if len(paths) > 1 else paths[0], len(paths), number)
        for (name, number), paths in found.items()
    ]
