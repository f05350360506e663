"""Coordinate checks of every model family, with AdamW and clipped SGD: under muP they must pass;
the standard parametrisation, and muP with any one rule left out, must fail and name the module.

    python benchmarks/coordinate_check.py --save
"""

import argparse
import time
from dataclasses import dataclass

from results import Row, save, table

from interlace.trainer.config.load import load_recipe
from interlace.trainer.config.mup_section import Rule
from interlace.trainer.mup.check.running import Request, check

SMALL = ("model.ffn_width=none", "data.respect_documents=false")
WIDTHS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Family:
    """A model family as it is checked.

    Attributes:
        recipe: The shipped recipe that it begins with.
        settings: What is changed about it.
        lr: Learning rate of each update rule.
        removed: Rules of muP that are left out one by one, and part of the title that must be
            named.
    """

    recipe: str
    settings: tuple[str, ...]
    lr: dict[str, float]
    removed: dict[Rule, str]


FAMILIES = {
    "Transformer": Family(
        "quickstart",
        ("model.layers=1", "model.ffn_width=512"),
        {"adamw": 0.01, "clipped_sgd": 1.0},
        {"hidden_lr": "mixer", "readout_multiplier": "head", "threshold": ""},
    ),
    "hybrid": Family(
        "quickstart_hybrid",
        ("model.pattern=MF AF", "model.layers=1", "model.mamba_head_width=8"),
        {"adamw": 0.01, "clipped_sgd": 1.0},
        {"row_blocks": "in_proj"},
    ),
    "mixture of experts": Family(
        "quickstart_moe",
        ("model.layers=1", "model.moe_expert_width=256"),
        {"adamw": 0.01, "clipped_sgd": 1.0},
        {"router": "router"},
    ),
    "energy-based": Family(
        "quickstart_ebt",
        ("model.layers=1", "model.ffn_width=256"),
        {"adamw": 0.003, "clipped_sgd": 0.3},
        {"readout_multiplier": "energy_head"},
    ),
}


def main() -> None:
    """Check all, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--family", choices=list(FAMILIES), help="this one only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/coordinate*")
    arguments = parser.parse_args()
    started, rows = time.process_time(), list[Row]()
    for name, family in FAMILIES.items():
        if arguments.family in (None, name):
            for rule in family.lr:
                rows += checked(name, family, rule, arguments.seeds)
    print(table(rows))
    wrong = [row for row in rows if row["as it must be"] != "yes"]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checks end as they must")
    notes = [
        f"Widths {', '.join(map(str, WIDTHS))}, {arguments.seeds} seeds, 10 steps on one batch of "
        "512 tokens",
        f"CPU seconds in all: {time.process_time() - started:.0f}",
    ]
    if arguments.save:
        save("coordinate_check", "Coordinate checks of every family", rows, notes)
    raise SystemExit(bool(wrong))


def checked(name: str, family: Family, rule: str, seeds: int) -> list[Row]:
    """Return a row for muP, for the standard parametrisation, and for every rule left out."""
    clipped = rule == "clipped_sgd"
    removed = {
        which: where for which, where in family.removed.items() if which != "threshold" or clipped
    }
    found = [row_of(name, family, rule, seeds, "muP")]
    found.append(row_of(name, family, rule, seeds, "standard"))
    found += [row_of(name, family, rule, seeds, f"without {which}") for which in removed]
    return found


def row_of(name: str, family: Family, rule: str, seeds: int, kind: str) -> Row:
    """Run one check and return its row."""
    settings = [*SMALL, *family.settings, f"optimizer.rule={rule}"]
    config = load_recipe(family.recipe, settings).config
    left_out: list[Rule] = [each for each in family.removed if kind == f"without {each}"]
    request = Request(
        widths=WIDTHS,
        seeds=seeds,
        lr=family.lr[rule],
        base_width=WIDTHS[0],
        without=left_out,
        standard=kind == "standard",
    )

    def tell(done: int, total: int) -> None:
        print(f"\r{name}, {rule}, {kind}: {done} of {total} ", end="", flush=True)

    verdict = check(config, request, tell).verdict
    print(flush=True)
    wanted = family.removed[left_out[0]] if left_out else ""
    named = verdict.at_fault or ""
    right = verdict.passes if kind == "muP" else not verdict.passes and wanted in named
    worst = verdict.failures[0] if verdict.failures else None
    return {
        "family": name,
        "rule": rule,
        "parametrisation": kind,
        "verdict": "passes" if verdict.passes else "fails",
        "first cause": f"{named}: {worst.statistic} {worst.slope:+.2f}" if worst else "",
        "as it must be": "yes" if right else "NO",
    }


if __name__ == "__main__":
    main()
