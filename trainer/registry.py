"""Registries: what a recipe may name, and the code behind each name.

One registry per kind of part: sequence and channel mixers, depth plans, objectives, data sources,
update rules, diagnostics. An entry is one small file that registers itself by decorator; parts that
come with the project are named here by module and imported when one is asked for, so that recipes
can be checked before anything heavy is loaded. Files of a user's own, named in `model.plugins`, are
imported by `load_plugins` and register in the same way.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from interlace.trainer.errors import ConfigError

Entry = TypeVar("Entry")
Kind = TypeVar("Kind")


@dataclass
class Registry(Generic[Entry]):
    """Names and what they stand for.

    Attributes:
        kind: What an entry is, for messages: `objective`.
        setting: The setting that names one: `train.objective`.
        built_in: Name to module of the entries that come with the project.
        entries: What has registered itself so far.
    """

    kind: str
    setting: str
    built_in: Mapping[str, str]
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Return a decorator that notes a class or function under a name.

        Raises:
            ValueError: The name is taken.
        """

        def note(entry: Kind) -> Kind:
            owner = self.built_in.get(name)
            foreign = owner is not None and owner != getattr(entry, "__module__", None)
            if foreign or name in self.entries:
                raise ValueError(f"{self.kind} {name}: is registered already; choose another name")
            self.entries[name] = entry  # pyright: ignore[reportArgumentType] - what it decorates
            return entry

        return note

    def names(self) -> list[str]:
        """Return every name that a recipe may use."""
        return sorted({*self.built_in, *self.entries})

    def get(self, name: str) -> Entry:
        """Return an entry, importing a built-in one if need be.

        Raises:
            ConfigError: There is none of this name.
        """
        if name not in self.entries and name in self.built_in:
            importlib.import_module(self.built_in[name])
        if name not in self.entries:
            raise ConfigError([self.unknown(name)])
        return self.entries[name]

    def unknown(self, name: str) -> str:
        """Return what to say of a name that is not registered."""
        return (
            f"{self.setting}={name}: there is no such {self.kind}; known: {', '.join(self.names())}"
        )


LOADED: list[Path] = []
"""Files of a user's own that this process has imported; processes that it starts import them too.
"""


def load_plugins(files: Iterable[str]) -> None:
    """Import a user's own files, each once per process, so that what is in them is registered.

    Raises:
        ConfigError: A file is missing, or raises while it is imported.
    """
    for file in files:
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            remedy = "if it was moved, say where to, in the recipe or as model.plugins=['PATH']"
            said = f"model.plugins={file}: there is no such file (looked at {path}); {remedy}"
            raise ConfigError([said])
        load_plugin(path)


def load_plugin(path: Path) -> None:
    """Import one file under a name of its own; the same content is not imported twice."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    name = f"interlace_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        said = f"{type(error).__name__}: {error}"
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f" ({path.name}, line {lines[-1].lineno})" if lines else ""
        raise ConfigError([f"model.plugins={path}: cannot be imported: {said}{where}"]) from error
    LOADED.append(path)
