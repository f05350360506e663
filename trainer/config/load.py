"""How a recipe becomes a `RunConfig`: find it, follow `extends`, apply overrides, check, remember
origins.

A recipe is a TOML file: a `description`, optionally `extends = "other"`, and tables that name the
sections of `RunConfig`. Later layers win: defaults, the extended recipes from the root down, the
recipe itself, then `section.key=value` overrides. Every value's history is kept, so that `interlace
why` can tell it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import cast, get_args

from interlace.trainer.config.checks import validate
from interlace.trainer.config.problems import near_miss
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.section import Section
from interlace.trainer.config.toml_files import parse_tables, read_tables
from interlace.trainer.errors import ConfigError

Table = dict[str, object]


@dataclass(frozen=True)
class Origin:
    """One layer that set a value: where, and to what."""

    where: str
    value: object


@dataclass(frozen=True)
class Recipe:
    """A recipe, resolved and checked, with the history of every value that something set."""

    name: str
    description: str
    config: RunConfig
    origins: Mapping[str, tuple[Origin, ...]]


@dataclass(frozen=True)
class Layer:
    """One file of an `extends` chain: where it is and the section tables it holds."""

    where: str
    sections: Table


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or a file by path, with `section.key=value` overrides.

    Raises:
        ConfigError: All problems found, each with key, value, reason and remedy.
    """
    path = find_recipe(name)
    document = read_toml(path)
    typed = parse_overrides(overrides)
    paths_beside(typed, Path.cwd())
    layers = [*read_layers(path), Layer("command line", typed)]
    merged: Table = {}
    origins: dict[str, tuple[Origin, ...]] = {}
    for layer in layers:
        merge(merged, layer, origins)
    run = merged.setdefault("run", {})
    if isinstance(run, dict) and path.name != "config.toml":
        cast(Table, run).setdefault("name", path.stem)
    return Recipe(path.stem, str(document.get("description", "")), validate(merged), origins)


def list_recipes() -> dict[str, str]:
    """Return the shipped recipes: name to one-line description."""
    return {
        path.stem: str(read_toml(path).get("description", ""))
        for path in sorted(recipes_folder().glob("*.toml"))
    }


def recipes_folder() -> Path:
    """Return the folder of the recipes that the package ships."""
    return Path(str(resources.files("interlace"))) / "configs"


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe: a path as it is, a bare name from `beside` or the shipped
    ones.
    """
    shipped = recipes_folder() / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        path = Path(name).expanduser()
        if beside is not None and not path.is_absolute():
            path = beside / path
        if path.is_file():
            return path
        if path.is_dir() and (path / "config.toml").is_file():
            return path / "config.toml"
        raise ConfigError([f"recipe {name}: no such file (looked at {path.absolute()})"])
    if beside is not None and (beside / f"{name}.toml").is_file():
        return beside / f"{name}.toml"
    if shipped.is_file():
        return shipped
    known = [path.stem for path in sorted(recipes_folder().glob("*.toml"))]
    hint = near_miss(name, known)
    listing = f"shipped recipes: {', '.join(known)}; your own needs its path, as in ./{name}.toml"
    raise ConfigError([f"recipe {name}: not found{hint}; {listing}"])


def read_toml(path: Path) -> Table:
    """Parse one TOML file; an unreadable or malformed one is a `ConfigError` naming file and
    line.
    """
    try:
        return read_tables(path)
    except ValueError as error:
        raise ConfigError([f"recipe {path}: not valid TOML: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"recipe {path}: cannot be read: {error.strerror}"]) from error


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """Return the `extends` chain of a recipe, root first."""
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(step.stem for step in (*seen, path))
        raise ConfigError([f"recipe {path.stem}: extends itself ({chain}); remove one `extends`"])
    document = read_toml(path)
    parent = document.pop("extends", None)
    document.pop("description", None)
    paths_beside(document, path.parent)
    here = Layer(f"recipe {path.stem} ({path})", document)
    if parent is None:
        return [here]
    if not isinstance(parent, str):
        raise ConfigError([f"recipe {path.stem}: extends={parent!r} must be one recipe's name"])
    return [*read_layers(find_recipe(parent, beside=path.parent), (*seen, path)), here]


def paths_beside(sections: Table, folder: Path) -> None:
    """Make the files of plug-ins and of DeepSpeed's settings that tables name absolute, seen from
    where the tables are written.
    """
    model, parallel = sections.get("model"), sections.get("parallel")
    if isinstance(model, dict):
        table = cast(Table, model)
        if isinstance(files := table.get("plugins"), list):
            table["plugins"] = [beside(file, folder) for file in cast(list[object], files)]
    if isinstance(parallel, dict):
        table = cast(Table, parallel)
        if file := table.get("deepspeed_config"):
            table["deepspeed_config"] = beside(file, folder)


def beside(file: object, folder: Path) -> object:
    """Return a path made absolute, seen from a folder; what is no text is for the schema to
    refuse.
    """
    return str((folder / Path(file).expanduser()).absolute()) if isinstance(file, str) else file


def merge(target: Table, layer: Layer, origins: dict[str, tuple[Origin, ...]]) -> None:
    """Write one layer's sections over `target` and note where each value came from."""
    for section, values in layer.sections.items():
        if not isinstance(values, dict):
            target[section] = values
            continue
        table = target.setdefault(section, {})
        if not isinstance(table, dict):
            table = target[section] = {}
        for key, value in cast(Table, values).items():
            cast(Table, table)[key] = value
            dotted = f"{section}.{key}"
            origins[dotted] = (*origins.get(dotted, ()), Origin(layer.where, value))


def parse_overrides(overrides: Sequence[str]) -> Table:
    """Turn `section.key=value` words into tables; values are TOML, bare words are text."""
    problems: list[str] = []
    tables: dict[str, Table] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        section, dot, field = key.strip().partition(".")
        if not (equals and dot and section and field):
            problems.append(
                f"{word!r}: not an override; write it as section.key=value, as in train.steps=100"
            )
            continue
        tables.setdefault(section, {})[field] = parse_value(section, field, text.strip())
    if problems:
        raise ConfigError(problems)
    return dict(tables)


def parse_value(section: str, field: str, text: str) -> object:
    """Read one override's value: TOML where the setting is not plain text; `none` unsets it."""
    annotation = annotation_of(section, field)
    if annotation is str or (str in get_args(annotation) and not text.startswith("[")):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if text.lower() == "none" and type(None) in get_args(annotation):
        return None
    try:
        return parse_tables(f"value = {text}")["value"]
    except ValueError:
        return text


def annotation_of(section: str, field: str) -> object:
    """Return the declared type of a setting, or None for an unknown one."""
    info = RunConfig.model_fields.get(section)
    if info is None or not (
        isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    ):
        return None
    leaf = info.annotation.model_fields.get(field)
    return None if leaf is None else leaf.annotation
