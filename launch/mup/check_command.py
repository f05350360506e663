"""`interlace mup check`: a coordinate check with a verdict, a picture and an exit status."""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import get_args

from interlace.launch.mup.check_page import check_page
from interlace.launch.output_files import finite, output_file, picture_file
from interlace.trainer.config.load import load_recipe
from interlace.trainer.config.mup_section import Rule
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.run_folder import write_json

LEAST_WIDTHS, LEAST_SPAN = 4, 8
DEFAULT_WIDTHS = (32, 64, 128, 256)


def check(arguments: Namespace, progress: Callable[[int, int], None]) -> int:
    """Check a recipe; return 0 if everything keeps its size over the widths, else 1.

    Raises:
        ConfigError: The request makes no sense; nothing was measured.
    """
    from interlace.trainer.mup.check.picture import draw
    from interlace.trainer.mup.check.running import Request
    from interlace.trainer.mup.check.running import check as measure

    config = load_recipe(arguments.recipe, arguments.overrides).config
    widths = parse_widths(arguments.widths, config)
    check_numbers(arguments)
    request = Request(
        widths=widths,
        seeds=arguments.seeds,
        steps=arguments.steps,
        tokens=arguments.tokens,
        lr=config.optimizer.peak_lr if arguments.lr is None else arguments.lr,
        base_width=config.mup.base_width or widths[0],
        without=parse_rules(arguments.without) or config.mup.without,
        standard=arguments.standard,
    )
    folder = arguments.output.rstrip("/")
    document = output_file("--output", f"{folder}/check.json")
    picture = picture_file("--output", f"{folder}/check.png")
    checked = measure(config, request, progress)
    verdict = checked.verdict
    # A bound that is none is null.
    about = finite(
        {
            "recipe": config.run.name,
            "rule": config.optimizer.rule,
            "request": asdict(request),
            "passes": verdict.passes,
            "at_fault": verdict.at_fault,
            "ended_early": list(verdict.ended_early),
            "slopes": [asdict(slope) | {"passes": slope.passes} for slope in verdict.slopes],
        }
    )
    write_json(document, about)
    draw(verdict, f"Coordinate check of {config.run.name}, {config.optimizer.rule}", picture)
    if arguments.json:
        print(json.dumps(about, indent=2))
    else:
        notes = [checked.note] if checked.note else []
        print(check_page(config, request, verdict, notes))
        print(f"\npicture  {picture}\nnumbers  {document}")
    sys.stdout.flush()
    return 0 if verdict.passes else 1


def parse_widths(text: str | None, config: RunConfig) -> list[int]:
    """Return the widths to check, the narrowest first.

    Raises:
        ConfigError: They are no numbers, too few or too near to each other.
    """
    base = config.mup.base_width
    if text is None:
        # A proxy's base may be the width of the model that it stands for.
        least = min(base, config.model.width) if base else 0
        return [least * factor for factor in (1, 2, 4, 8)] if base else list(DEFAULT_WIDTHS)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(
            [f"--widths {text}: must be whole numbers with commas; type --widths 32,64,128,256"]
        )
    widths = sorted({int(word) for word in words})
    if len(widths) < LEAST_WIDTHS or widths[-1] < LEAST_SPAN * widths[0]:
        wider = ",".join(str(widths[0] * factor) for factor in (1, 2, 4, 8))
        raise ConfigError(
            [
                f"--widths {text}: a slope needs at least {LEAST_WIDTHS} widths, the widest at "
                f"least {LEAST_SPAN} times the narrowest; type --widths {wider}"
            ]
        )
    return widths


def parse_rules(names: list[str] | None) -> list[Rule]:
    """Return the rules to leave out.

    Raises:
        ConfigError: One is unknown.
    """
    rules = get_args(Rule)
    wanted = [name for text in names or [] for name in text.split(",")]
    unknown = [name for name in wanted if name not in rules]
    if unknown:
        raise ConfigError(
            [f"--without {unknown[0]}: there is no such rule; type one of {', '.join(rules)}"]
        )
    return [rule for rule in rules if rule in wanted]


def check_numbers(arguments: Namespace) -> None:
    """Raise `ConfigError` for numbers that mean nothing."""
    problems = [
        f"--{name} {getattr(arguments, name)}: must be {least} or more; type --{name} {usual}"
        for name, least, usual in (("seeds", 1, 3), ("steps", 4, 10), ("tokens", 16, 512))
        if getattr(arguments, name) < least
    ]
    if arguments.lr is not None and not 0.0 < arguments.lr < math.inf:
        problems.append(f"--lr {arguments.lr}: must be a rate above 0; leave it out for the usual")
    if arguments.standard and arguments.without:
        problems.append("--without: --standard leaves out all rules already; type one of the two")
    if problems:
        raise ConfigError(problems)
