"""A user's own settings of DeepSpeed: one JSON file, read strictly.

What DeepSpeed reads loosely is refused here with line and reason: comments, a key that stands
twice, numbers that JSON has not. Whether the settings fit a recipe is for `merging` to say.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from interlace.trainer.errors import ConfigError

COMMENTS = ("//", "/*", "#")


def read_own_settings(file: str) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where no file is named.

    Args:
        file: As in `parallel.deepspeed_config`.

    Raises:
        ConfigError: It cannot be read, or is not a JSON object.
    """
    if not file:
        return {}
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        moved = "if it was moved, say where to, as parallel.deepspeed_config=PATH"
        refuse(file, f"there is no such file; {moved}")
    except OSError as error:
        refuse(file, f"cannot be read ({error.strerror}); type the path of a JSON file")
    except UnicodeDecodeError as error:
        refuse(file, f"is not text in UTF-8 (byte {error.start}); type the path of a JSON file")
    return parsed(file, text)


def parsed(file: str, text: str) -> dict[str, Any]:
    """Return the object that a text is.

    Raises:
        ConfigError: It is something else.
    """
    try:
        document = json.loads(text, object_pairs_hook=without_twins, parse_constant=no_number)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        if line.startswith(COMMENTS) or text[error.pos :].startswith(COMMENTS):
            refuse(file, f"line {error.lineno} is a comment, which JSON has not; take it out")
        where = f"line {error.lineno}, column {error.colno}"
        refuse(file, f"is not JSON ({error.msg}: {where}); mend it there")
    except RecursionError:
        refuse(file, "holds tables within tables without end; it is no file of DeepSpeed's")
    except ValueError as error:
        refuse(file, str(error))
    if not isinstance(document, dict):
        kind = {list: "a list", str: "text"}.get(type(document), "a single value")
        refuse(file, f"holds {kind}, and settings of DeepSpeed are one object, in braces")
    return cast(dict[str, Any], document)


def without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON.

    Raises:
        ValueError: A key stands twice in it.
    """
    keys = [key for key, _ in pairs]
    twins = sorted({key for key in keys if keys.count(key) > 1})
    if twins:
        raise ValueError(f"has {', '.join(twins)} twice in one table; take one of them out")
    return dict(pairs)


def no_number(word: str) -> NoReturn:
    """Refuse `NaN` and `Infinity`, which Python reads and JSON has not."""
    raise ValueError(f"holds {word}, which is no number of JSON; write a finite one")


def refuse(file: str, reason: str) -> NoReturn:
    """Raise `ConfigError` about the file."""
    raise ConfigError([f"parallel.deepspeed_config={file}: {reason}"])
