"""How exactly a resumed run repeats what an undisturbed one would have computed.

    D0  same program, libraries, device, ranks and threads: every loss is the same to the last bit
    D1  other ranks, threads or engine: same rows in the same order, losses the same up to rounding
    D2  other program, library or device: same rows, and losses within a tolerance only

Sums are taken in another order on more ranks or threads and by another engine, and kernels of
another version or device round otherwise; neither is wrong. What is compared is `environment.json`
of the start before.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

ENVIRONMENT_NAME = "environment.json"

WITHIN_ROUNDING = ("world_size", "torch_threads", "engine")
"""What may change under D1; anything else of `COMPARED` lowers to D2."""

ONCE = {"engine": "fsdp2"}
"""What every start had that does not say it: there was nothing else to have."""

COMPARED = (
    *WITHIN_ROUNDING,
    "sources",
    "python",
    "libraries.torch",
    "libraries.triton",
    "libraries.numba",
    "libraries.numpy",
    "cuda",
    "processor",
    "gpus",
)

MEANING = {
    "D1": "rows come in the same order, and losses are those of an undisturbed run up to rounding",
    "D2": "rows come in the same order, and losses are near those of an undisturbed run",
}


def contract_note(before: Mapping[str, object] | None, now: Mapping[str, object]) -> str:
    """Return the line that a resumed run prints.

    Args:
        before: `environment.json` of the start before, or None if it cannot be read.
        now: What it will hold for this start.
    """
    if before is None:
        return f"determinism unknown: {ENVIRONMENT_NAME} of the start before cannot be read"
    changed = list(changes(before, now))
    if not changed:
        return "determinism D0: losses are those of an undisturbed run, bit for bit"
    level = "D1" if {key for key, _ in changed} <= set(WITHIN_ROUNDING) else "D2"
    listed = ", ".join(text for _, text in changed)
    return f"determinism lowered to {level}: {listed}; {MEANING[level]}"


def changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield what changed: its key and a few words. What the start before did not know is left
    out.
    """
    for key in COMPARED:
        was, found = (look_up(each, key) or ONCE.get(key) for each in (before, now))
        if was is not None and was != found:
            yield key, f"{key.rpartition('.')[2]} is now {found}, was {was}"


def look_up(environment: Mapping[str, object], key: str) -> object:
    """Return the value of `key` or `table.key`, None where there is none."""
    table, _, leaf = key.rpartition(".")
    if not table:
        return environment.get(leaf)
    inner = environment.get(table)
    return cast(Mapping[str, object], inner).get(leaf) if isinstance(inner, dict) else None


def read_environment(run_dir: Path) -> Mapping[str, object] | None:
    """Return the environment of the newest start of a run, or None if it cannot be read."""
    try:
        found: object = json.loads((run_dir / ENVIRONMENT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return cast(Mapping[str, object], found) if isinstance(found, dict) else None
