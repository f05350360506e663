"""Files that a command is told to write: refused before any work is done for them; and what JSON
cannot say.
"""

import math
import os
from pathlib import Path
from typing import Any

from interlace.trainer.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def output_file(option: str, name: str) -> Path:
    """Return the path of a file to write; its folder exists afterwards.

    Raises:
        ConfigError: It is a folder, or cannot be written.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError([f"{option} {name}: is a folder; give the name of a file in it"])
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(
            [
                f"{option} {name}: cannot be written ({error.strerror}); give a file in a folder "
                "that you may write to"
            ]
        ) from error
    return path


def picture_file(option: str, name: str) -> Path:
    """Return the path of a picture to write.

    Raises:
        ConfigError: Its format is unknown, it is a folder, or cannot be written.
    """
    if not Path(name).is_dir() and Path(name).suffix.lower() not in PICTURES:
        raise ConfigError([f"{option} {name}: give a file that ends in .png, .svg or .pdf"])
    return output_file(option, name)


def finite(value: Any) -> Any:
    """Return a document with None in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value
