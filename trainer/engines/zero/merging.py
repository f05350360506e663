"""Merges a user's own settings of DeepSpeed with those that follow from a recipe.

What the recipe decides may be left out, be `"auto"` or say the same. Anything else of it is a
conflict, and all conflicts are told at once: where in the file, both values, and what to type into
the recipe instead. What would make DeepSpeed train otherwise than the loop expects is refused with
its reason. All other settings win over the defaults of `settings`, or pass through.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from interlace.trainer.config.problems import LONGEST_SHOWN, near_miss
from interlace.trainer.engines.zero.known_keys import KNOWN

AUTO = "auto"
"""What DeepSpeed's users write for "as it follows from the rest"."""

Table = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """What a recipe makes of one setting of DeepSpeed.

    Attributes:
        value: What it is.
        source: The setting of the recipe that decides it.
        instead: Returns what to type into the recipe for another value, or nothing where no value
            of the recipe gives that.
    """

    value: Any
    source: str
    instead: Callable[[Any], str]


@dataclass(frozen=True)
class Refusal:
    """A setting of DeepSpeed that may have some values only.

    Attributes:
        allowed: Values that change nothing; with none the setting is refused as a whole.
        reason: Why not another, and what to do.
    """

    allowed: tuple[Any, ...]
    reason: str


class Merge:
    """One merge, under way.

    Args:
        settings: What follows from a recipe, and defaults.
        decisions: What of it the recipe decides, by path (`zero_optimization.stage`).
        refusals: What is refused, by path.
    """

    def __init__(
        self, settings: Table, decisions: Mapping[str, Decision], refusals: Mapping[str, Refusal]
    ) -> None:
        self.settings = settings
        self.decisions = decisions
        self.refusals = refusals
        self.problems: list[str] = []

    def add(self, own: Table, path: Sequence[str] = ()) -> None:
        """Add what a table of the user's holds, and note what does not fit.

        Args:
            own: The table.
            path: The keys that lead to it.
        """
        known = KNOWN.get(".".join(path))
        for key, value in own.items():
            if known is not None and key not in known:
                where = f" under {'.'.join(path)}" if path else ""
                hint = near_miss(key, known) or "; take it out"
                self.problems.append(f"DeepSpeed has no setting {key}{where}{hint}")
            else:
                self.add_one((*path, key), value)

    def add_one(self, path: Sequence[str], value: Any) -> None:
        """Add one setting of the user's, or note why not."""
        name = ".".join(path)
        refusal, decision = self.refusals.get(name), self.decisions.get(name)
        if refusal is not None and not among(value, (*refusal.allowed, AUTO)):
            self.problems.append(f"{name} is {shown(value)}: {refusal.reason}")
        elif decision is not None and not among(value, (decision.value, AUTO)):
            self.problems.append(conflict(name, value, decision))
        elif isinstance(value, dict):
            self.add(cast(Table, value), path)
        elif name in TABLES and not among(value, (AUTO,)):
            self.problems.append(f"{name} is {shown(value)}, and DeepSpeed has a table there")
        elif decision is None and not among(value, (AUTO,)):
            # DeepSpeed's own default is what "auto" leaves, or that of ours.
            self.put(path, value)

    def put(self, path: Sequence[str], value: Any) -> None:
        """Set a value, in tables that are made on the way."""
        table = self.settings
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = value


TABLES = frozenset(name for name in KNOWN if name)
"""Settings that are tables."""


def conflict(name: str, value: Any, decision: Decision) -> str:
    """Say that file and recipe differ, and what to type."""
    typed = decision.instead(value)
    remedy = f"leave it out, or type {typed}" if typed else "leave it out"
    return (
        f"{name} is {shown(value)}, and the recipe makes it {shown(decision.value)} "
        f"({decision.source}); {remedy}"
    )


def among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value of JSON is one of some; `true` is no number here, as it is in Python."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )


def shown(value: Any) -> str:
    """Return a value as it stands in JSON; of a long one the beginning."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
