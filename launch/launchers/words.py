"""Words that all launchers share."""

import argparse
from collections.abc import Callable

AddParser = Callable[..., argparse.ArgumentParser]


def described(
    commands: AddParser, name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command whose help ends with examples."""
    return commands(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_words(launcher: argparse.ArgumentParser, resumes: bool = True) -> None:
    """Add what every launcher takes as `interlace train` does: recipe, overrides, `--resume`."""
    launcher.add_argument(
        "recipe",
        nargs="?" if resumes else None,
        metavar="RECIPE",
        help="shipped recipe, or path of a TOML file",
    )
    launcher.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="settings that win over the recipe's (train.steps=100)",
    )
    launcher.set_defaults(resume=None)
    if resumes:
        launcher.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
