"""Trials: what each one trains, as a whole recipe, and the digest it is known by.

A digest covers everything that a result depends on: the resolved recipe without what only says
where files lie, the text it reads, the code and torch's version. So equal digests mean equal
results, whoever ran them and for whatever sweep, and a change of one line of code asks anew.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from interlace.launch.sweep.request import Parametrisation, Request
from interlace.trainer.config.checks import validate
from interlace.trainer.config.load import load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.mup.widths import at_width, with_whole_heads

RESULT_FORMAT = 1
"""Raised when a result is computed in another way from the same training."""

SOURCES = ("kernels", "offload", "trainer")
"""Layers that decide what training gives; `launch` only starts it."""

WITHOUT_EFFECT = {
    "data": ("prepared_dir", "workers"),
    "checkpoint": (
        "hours_between_failures",
        "asynchronous",
        "copy_budget_gib",
        "tries",
        "retry_seconds",
        "notice_seconds",
        "keep_last",
        "keep_every_steps",
    ),
    "observe": (
        "log_every_steps",
        "trace_steps",
        "sample_prompts",
        "sample_tokens",
        "sample_temperature",
    ),
    "offload": ("cpu_threads", "recalibrate"),
}
"""Settings that a result does not depend on, besides those that are the same for all trials."""

Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True, order=True)
class Trial:
    """One training run of a sweep; the order is that of growing cost.

    Attributes:
        width: Width of the model.
        parametrisation: How everything follows the width.
        settings: Further settings that are swept, as `section.key=value` words.
        seed: Of weights and data order.
        log2_lr: log2 of the learning rate.
    """

    width: int
    parametrisation: Parametrisation
    settings: tuple[str, ...]
    seed: int
    log2_lr: float

    @property
    def lr(self) -> float:
        """The learning rate, as a person would write it."""
        return learning_rate(self.log2_lr)


def learning_rate(log2_lr: float) -> float:
    """Return 2 to a power; powers that came of a decimal number give that number again."""
    rate = 2.0**log2_lr
    return rate if float(log2_lr).is_integer() else float(f"{rate:.12g}")


@dataclass(frozen=True)
class Space:
    """Everything that a sweep may try.

    Attributes:
        request: As asked.
        configs: The recipe of every combination of further settings.
        base_width: Width whose learning rates are meant.
        code: Digest of the code.
        device: `cpu` or `cuda`.
        texts: Digest of the text of every combination.
        notes: What was changed about the recipes so that all widths are possible.
    """

    request: Request
    configs: Mapping[tuple[str, ...], RunConfig]
    base_width: int
    code: str
    device: str
    texts: Mapping[tuple[str, ...], str]
    notes: Sequence[str] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every point, from the recipe's own on."""
        first = next(iter(self.configs.values())).run.seed
        return tuple(range(first, first + self.request.seeds))

    def config_of(self, trial: Trial) -> RunConfig:
        """Return the whole recipe of a trial, except for the folder it runs in.

        Raises:
            ConfigError: The recipe cannot have this width.
        """
        tables: Tables = at_width(self.configs[trial.settings], trial.width).model_dump()
        tables["run"] |= {"seed": trial.seed, "name": "trial", "dir": ""}
        tables["optimizer"] |= {"peak_lr": trial.lr}
        scaled = trial.parametrisation == "mup"
        tables["mup"] |= {"enabled": scaled, "base_width": self.base_width if scaled else None}
        if not scaled:
            tables["mup"] |= {"without": []}
        tables["checkpoint"] |= {"every": "steps", "every_steps": 0}
        tables["observe"] |= {"sample_tokens": 0, "trace_steps": None}
        return validate(tables)

    def key_of(self, trial: Trial) -> str:
        """Return the digest (64 hexadecimal digits) that a trial's result is kept under."""
        return digest(
            {
                "format": RESULT_FORMAT,
                "recipe": what_counts(self.config_of(trial)),
                "text": self.texts[trial.settings],
                "code": self.code,
                "device": self.device,
            }
        )


def make_space(request: Request, device: str) -> Space:
    """Resolve the recipe of a request with every combination of settings, and at every width.

    Raises:
        ConfigError: A setting, or a width, that the recipe cannot have.
        DataError: The text is not there.
    """
    from interlace.trainer.data.prepare import list_inputs

    fitted = {
        settings: with_whole_heads(
            load_recipe(request.recipe, [*request.overrides, *settings]).config, request.widths
        )
        for settings in request.grid
    }
    configs = {settings: config for settings, (config, _) in fitted.items()}
    notes = tuple(dict.fromkeys(note for _, note in fitted.values() if note))
    base = next(iter(configs.values())).mup.base_width
    base_width = request.base_width or base or request.widths[0]
    texts = {key: list_inputs(config.data).folder.name for key, config in configs.items()}
    space = Space(request, configs, base_width, code_version(), device, texts, notes)
    problems: list[str] = []
    for settings in request.grid:
        for parametrisation in request.parametrisations:
            for width in request.widths:
                rate = request.ladder.grid[0]
                trial = Trial(width, parametrisation, settings, space.seeds[0], rate)
                try:
                    space.config_of(trial)
                except ConfigError as error:
                    problems += [f"at width {width}: {text}" for text in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return space


def what_counts(config: RunConfig) -> Tables:
    """Return the tables of a recipe without what has no effect on its losses; plug-ins by their
    text.
    """
    tables: Tables = config.model_dump(mode="json")
    for section, keys in WITHOUT_EFFECT.items():
        for key in keys:
            tables[section].pop(key, None)
    tables["model"]["plugins"] = [
        hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
        for file in config.model.plugins
    ]
    return tables


def shape_digest(config: RunConfig) -> str:
    """Return a digest of what decides how long a trial takes."""
    tables = what_counts(config)
    kept = {name: tables[name] for name in ("model", "data", "train", "offload", "energy")}
    return digest(kept)[:16]


def digest(document: Mapping[str, object]) -> str:
    """Return the SHA-256 of a JSON document, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_version() -> str:
    """Return a digest of the sources that training consists of, and of torch's version."""
    import torch

    import interlace

    total = hashlib.sha256(torch.__version__.encode())
    root = Path(interlace.__file__).parent
    for layer in SOURCES:
        for path in sorted((root / layer).resolve().rglob("*.py")):
            total.update(f"{layer}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()
