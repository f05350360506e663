"""The words of `interlace mup`; nothing heavy is loaded to explain them."""

import argparse
from collections.abc import Callable

AddParser = Callable[..., argparse.ArgumentParser]

SUMMARY = "what muP makes of a recipe: every tensor's start, rates and multipliers"
TABLE = "show role, growth, start, learning rate, decay, epsilon and threshold of every parameter"

TABLE_EXAMPLES = """\
Equal rows of repeated layers are one line with a count. Beside every number stands the factor that
muP puts on it; where none stands it is 1. Start is the standard deviation of the initial values.

examples:
  interlace mup table quickstart --base-width 128            as if carried over from width 128
  interlace mup table mine.toml model.width=1024 --all       one line for every parameter
  interlace mup table quickstart_hybrid --base-width 128 optimizer.rule=clipped_sgd
  interlace mup table mine.toml --json
"""


CHECK = "train a few steps at several widths: does everything keep its size?"
CHECK_EXAMPLES = """\
Under muP activations, their changes, gradients and updates are as large in a wide model as in a
narrow one. Small models of the recipe are trained a few steps on one batch, and each size is fitted
as a power of the width. The first module that is off in the order of cause is named. The exit
status is 0 if all is within bounds, and 1 if not: put it into a test of your own blocks.

examples:
  interlace mup check quickstart
  interlace mup check quickstart_hybrid --widths 64,128,256,512 --seeds 2
  interlace mup check quickstart optimizer.rule=clipped_sgd optimizer.peak_lr=0.3
  interlace mup check quickstart --standard                  without muP: must fail
  interlace mup check quickstart --without readout_multiplier
"""


def add_mup(commands: AddParser) -> None:
    """Add the `mup` command."""
    mup = commands("mup", help=SUMMARY, description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    views: AddParser = mup.add_subparsers(dest="view", metavar="VIEW", required=True).add_parser
    add_table(views)
    add_check(views)


def add_view(views: AddParser, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Add a view of a recipe and return its parser."""
    view = views(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    view.add_argument("recipe", metavar="RECIPE", help="shipped recipe, or path of a TOML file")
    view.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="settings that win over the recipe's, as section.key=value",
    )
    view.add_argument("--json", action="store_true", help="print JSON")
    return view


def add_table(views: AddParser) -> None:
    """Add `mup table`."""
    table = add_view(views, "table", TABLE, TABLE_EXAMPLES)
    table.add_argument(
        "--base-width",
        type=int,
        metavar="N",
        help="width whose settings are carried over, in place of mup.base_width",
    )
    table.add_argument("--all", action="store_true", help="show every parameter of every layer")


def add_check(views: AddParser) -> None:
    """Add `mup check`."""
    check = add_view(views, "check", CHECK, CHECK_EXAMPLES)
    check.add_argument(
        "--widths",
        metavar="A,B,C,D",
        help="at least 4, over at least 8 times (default: 1, 2, 4 and 8 times mup.base_width, or "
        "the recipe's own width where that is smaller; 32,64,128,256 without mup.base_width)",
    )
    numbers = (
        ("--seeds", 3, "seeds at every width"),
        ("--steps", 10, "steps of every trial"),
        ("--tokens", 512, "tokens of the batch that is passed in every step"),
    )
    for option, usual, what in numbers:
        check.add_argument(
            option, type=int, default=usual, metavar="N", help=f"{what} (default: {usual})"
        )
    check.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="constant learning rate at the base width (default: the recipe's); mistakes show "
        "sooner at a larger one",
    )
    check.add_argument(
        "--without",
        action="append",
        metavar="RULE",
        help="leave out a rule of muP, as in mup.without, to see what it is for",
    )
    check.add_argument(
        "--standard", action="store_true", help="train without muP: the check must fail"
    )
    check.add_argument(
        "--output",
        default="mup_check",
        metavar="DIR",
        help="folder for check.json and check.png (default: mup_check)",
    )
