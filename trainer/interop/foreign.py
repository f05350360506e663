"""Settings of a foreign `config.json`, read with suspicion: what would change the result and has no
equal here is noted, and all of it is reported at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from interlace.trainer.errors import ConfigError


class ForeignSettings:
    """A `config.json` and what speaks against it.

    Args:
        path: The file, for messages.
        values: What it says.
    """

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path = path
        self.values = values
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number; one below `least`, or missing without a default, is a problem and
        counts as 1.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        wanted = f"must be a whole number, {least} or more"
        self.problems.append(f"{self.path}: {key}={value}: {wanted}")
        return 1

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        self.problems.append(f"{self.path}: {key}={value}: must be a number")
        return default

    def demand(self, key: str, expected: object, default: object, why: str) -> None:
        """Note a problem unless a setting, or its default there, has the one value that we can
        express.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if value != expected:
            self.refuse(key, value, why)

    def refuse(self, key: str, value: object, why: str) -> None:
        """Note that a setting has no equal here."""
        self.problems.append(f"{self.path}: {key}={value}: {why}, so it cannot be imported")

    def rope_base(self) -> float:
        """Return the base of rotary positions; a scaled or partial embedding is a problem."""
        spelled = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        rope = cast(Mapping[str, object], spelled if isinstance(spelled, dict) else {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            self.refuse("rope_parameters.rope_type", kind, "rotary positions are not scaled here")
        part = rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor", 1.0))
        if part != 1.0:
            self.refuse("partial_rotary_factor", part, "rotary positions turn whole heads here")
        base = rope.get("rope_theta", self.values.get("rope_theta", 10_000.0))
        if isinstance(base, (int, float)) and base > 1:
            return float(base)
        self.refuse("rope_theta", base, "a base is a number above 1")
        return 10_000.0

    def check(self) -> None:
        """Raise `ConfigError` if anything was noted."""
        if self.problems:
            raise ConfigError(self.problems)
