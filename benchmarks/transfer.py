"""Does the best learning rate of a narrow model stay the best of a wide one? Sweeps of the recipe
`proxy` over widths 32 to 256, with AdamW and clipped SGD, under muP and the standard
parametrisation.

    python benchmarks/transfer.py --save

Half an hour of one core. Trials are kept (`--store`), so it goes on where it was stopped.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import RESULTS, Row, save, table

from interlace.launch.cli import main as interlace

WIDTHS = "32,64,128,256"
SWEEPS = {"adamw": "2**-11:2**-7", "clipped_sgd": "2**-4:2**0"}
"""Learning rates at the recipe's base width that are asked for; where the best is at an edge, the
grid grows by itself.
"""


@dataclass(frozen=True)
class Swept:
    """A finished sweep of one update rule."""

    rule: str
    folder: Path
    document: dict[str, Any]


def sweep(rule: str, arguments: argparse.Namespace) -> Swept:
    """Run one sweep, as far as it is not in the store."""
    folder = Path(arguments.output) / rule
    words = ["sweep", "proxy", f"optimizer.rule={rule}", "--widths", WIDTHS]
    words += ["--lr", SWEEPS[rule], "--parametrisation", "both", "--seeds", str(arguments.seeds)]
    words += ["--store", arguments.store, "--output", str(folder)]
    words += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    print(f"interlace {' '.join(words)}", flush=True)
    status = interlace(words)
    if status not in (0, 1):
        sys.exit(status)
    document = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if not all(family["transfer"]["bracketed"] for family in document["families"]):
        sys.exit("an optimum is not known at every width: there is nothing to compare")
    return Swept(rule, folder, document)


def rows_of(swept: Swept) -> list[Row]:
    """Return a row per parametrisation."""
    rows: list[Row] = []
    for family in swept.document["families"]:
        transfer = family["transfer"]
        muP = family["parametrisation"] == "mup"
        optima = {each["width"]: each["log2_lr"] for each in transfer["optima"]}
        widest = transfer["optima"][-1]
        right = family["passes"] if muP else transfer["is_control"]
        worst = max(transfer["regrets"], key=lambda each: each["relative"] - each["allowed"])
        rows.append(
            {
                "rule": swept.rule,
                "parametrisation": "muP" if muP else "standard",
                "best log2 lr by width": ", ".join(f"{each:.2f}" for each in optima.values()),
                "drift": transfer["drift"],
                "drift, 95%": f"{transfer['drift_low']:+.2f} to {transfer['drift_high']:+.2f}",
                "highest regret": worst["relative"],
                "allowed": worst["allowed"],
                "loss at the widest": widest["loss"],
                "as it must be": "yes" if right else "NO",
            }
        )
    return rows


def main() -> None:
    """Sweep, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="trials at a time (default one per core)")
    parser.add_argument("--store", default="runs/trials", help="where trials are kept")
    parser.add_argument("--output", default="runs/transfer", help="where tables and pictures go")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/transfer*")
    arguments = parser.parse_args()
    swept = [sweep(rule, arguments) for rule in SWEEPS]
    rows = [row for each in swept for row in rows_of(each)]
    print(table(rows))
    trials = [trial for each in swept for trial in each.document["trials"]]
    notes = [
        f"Recipe `proxy` at widths {WIDTHS}, {arguments.seeds} seeds; learning rates are those at "
        f"width {swept[0].document['base_width']}; regret is that of the narrowest width's best "
        "learning rate, as a share of the loss",
        f"{len(trials)} trials, {sum(each['cpu_seconds'] for each in trials) / 60:.1f} CPU minutes",
    ]
    print("\n".join(notes))
    if arguments.save:
        save("transfer", "Transfer of the learning rate over the width", rows, notes)
        for each in swept:
            shutil.copyfile(each.folder / "sweep.json", RESULTS / f"transfer-{each.rule}.json")
            shutil.copyfile(each.folder / "sweep.png", RESULTS / f"transfer-{each.rule}.png")
    sys.exit(any(row["as it must be"] != "yes" for row in rows))


if __name__ == "__main__":
    main()
