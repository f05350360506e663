"""The words of `interlace sweep`; nothing heavy is loaded to explain them."""

import argparse
from collections.abc import Callable

AddParser = Callable[..., argparse.ArgumentParser]

SUMMARY = "find the best learning rate at several widths and tell whether it transfers"

EXAMPLES = """\
Every trial is one training run at one width, learning rate and seed. What it gave is kept under the
digest of its recipe and of the code: a sweep that was stopped goes on where it was, a larger one
takes over what a smaller one has found. The narrowest width is tried at every learning rate; where
the best is at an edge, the grid grows by itself. Wider ones need a few points around it.

examples:
  interlace sweep quickstart --widths 64,128,256 --lr 2**-12:2**-4 --seeds 3
  interlace sweep proxy --widths 32,64,128,256 --lr 2**-11:2**-7 --parametrisation both
  interlace sweep mine.toml --widths 32,64,128 --lr 2**-10:2**-4:0.5     half octaves
  interlace sweep mine.toml --widths 32,64 --lr 0.001,0.002,0.004        a list
  interlace sweep mine.toml --widths 32,64 --lr 2**-9:2**-4 --grid optimizer.beta2=0.95,0.99
  interlace sweep mine.toml --widths 32,64 --lr 2**-9:2**-4 --parametrisation both
  interlace sweep mine.toml --widths 32,64 --lr 2**-9:2**-4 --transfer-to gpt_1b_offload
  interlace sweep mine.toml --widths 32,64 --lr 2**-9:2**-4 --dry-run    only list the trials

Exit status: 0 the learning rate transfers (or only the standard parametrisation was asked for),
1 it does not or is not known, 2 a mistake in the request, 130 interrupted.
"""


def add_sweep(commands: AddParser) -> None:
    """Add the `sweep` command."""
    sweep = commands(
        "sweep",
        help=SUMMARY,
        description=SUMMARY[0].upper() + SUMMARY[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("recipe", metavar="RECIPE", help="shipped recipe, or path of a TOML file")
    sweep.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="settings of all trials"
    )
    sweep.add_argument(
        "--widths", required=True, metavar="A,B,...", help="widths of the model (model.width)"
    )
    sweep.add_argument(
        "--lr",
        required=True,
        metavar="A:B[:STEP]|A,B,...",
        help="learning rates (optimizer.peak_lr): from A to B in steps of STEP octaves (default "
        "1), or a list; 2**-7 is read as a power",
    )
    sweep.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds of every point (default 3)"
    )
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SECTION.KEY=A,B,...",
        help="sweep another setting as well; may be given several times",
    )
    sweep.add_argument(
        "--parametrisation",
        default="mup",
        choices=("mup", "standard", "both"),
        help="how everything follows the width (default mup; both shows them side by side)",
    )
    sweep.add_argument(
        "--base-width",
        type=int,
        metavar="W",
        help="width whose learning rates are meant (default mup.base_width, else the narrowest)",
    )
    add_running(sweep)
    add_results(sweep)


def add_running(sweep: argparse.ArgumentParser) -> None:
    """Add the words that say where trials run."""
    sweep.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="trials at a time (default one per core, or per GPU)",
    )
    sweep.add_argument(
        "--on",
        default="local",
        choices=("local", "ray"),
        help="processes of this machine (default), or trials of Ray Tune",
    )
    sweep.add_argument(
        "--store",
        default="runs/trials",
        metavar="DIR",
        help="where results of trials are kept, for all sweeps (default runs/trials)",
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="list the trials and how long they would take"
    )


def add_results(sweep: argparse.ArgumentParser) -> None:
    """Add the words that say what becomes of the results."""
    sweep.add_argument(
        "--output",
        metavar="DIR",
        help="where table, picture and verdict go (default runs/sweep-RECIPE)",
    )
    sweep.add_argument(
        "--transfer-to",
        metavar="RECIPE",
        help="write the winner into a recipe for this one, and tell how far that extrapolates",
    )
    sweep.add_argument("--json", action="store_true", help="print JSON")
