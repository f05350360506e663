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


def add_mup(commands: AddParser) -> None:
    """Add the `mup` command."""
    mup = commands("mup", help=SUMMARY, description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    views: AddParser = mup.add_subparsers(dest="view", metavar="VIEW", required=True).add_parser
    add_table(views)


def add_table(views: AddParser) -> None:
    """Add `mup table`."""
    table = views(
        "table",
        help=TABLE,
        description=TABLE[0].upper() + TABLE[1:] + ".",
        epilog=TABLE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    table.add_argument("recipe", metavar="RECIPE", help="shipped recipe, or path of a TOML file")
    table.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="settings that win over the recipe's, as section.key=value",
    )
    table.add_argument(
        "--base-width",
        type=int,
        metavar="N",
        help="width whose settings are carried over, in place of mup.base_width",
    )
    table.add_argument("--all", action="store_true", help="show every parameter of every layer")
    table.add_argument("--json", action="store_true", help="print JSON")
