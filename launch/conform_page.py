"""`interlace conform`: which mixers to hold to their promises, and the findings on a page."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from interlace.trainer.config.load import load_recipe, parse_overrides
from interlace.trainer.conformance import Report, Result, conform, trial_shape
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.registry import letter_of, registered_letters
from interlace.trainer.registry import load_plugins

WIDTH = 100
LABEL = 20
MARKS = {"passed": "ok", "failed": "FAILED", "does not apply": "-"}


def settings_to_try(
    plugins: Sequence[str], recipe: str | None, overrides: Sequence[str]
) -> dict[str, object]:
    """Load plug-ins, those of a recipe and those named by file, and return the settings of
    `[model]` that a trial is asked for: the recipe's `options`, then overrides.

    Raises:
        ConfigError: A file is missing or broken, or an override is none of `[model]`.
    """
    tables = parse_overrides(overrides)
    foreign = [
        f"{section}.{key}: a mixer is tried on random numbers and sees model settings only; leave "
        "it out"
        for section, table in tables.items()
        if section != "model" and isinstance(table, dict)
        for key in table
    ]
    if foreign:
        raise ConfigError(foreign)
    missing = [file for file in plugins if not Path(file).expanduser().is_file()]
    if missing:
        raise ConfigError(
            [f"--plugin {file}: there is no such file; give the path of a .py" for file in missing]
        )
    settings: dict[str, object] = {}
    if recipe is not None:
        settings["options"] = dict(load_recipe(recipe).config.model.options)
    load_plugins(plugins)
    given = tables.get("model")
    return settings | (given if isinstance(given, dict) else {})


def letters_to_try(name: str | None, every: bool) -> list[str]:
    """Return the letters of the mixers that are asked for.

    Raises:
        ConfigError: None is, or there is no such mixer.
    """
    if every == (name is not None):
        known = ", ".join(f"{name} ({letter})" for letter, name in registered_letters().items())
        raise ConfigError([f"conform mixer: give one NAME or --all; known mixers: {known}"])
    return sorted(registered_letters()) if name is None else [letter_of(name)]


def reports_on(letters: Sequence[str], settings: Mapping[str, object]) -> list[Report]:
    """Hold mixers to their promises, one after the other."""
    return [conform(letter, trial_shape(letter, settings)) for letter in letters]


def as_documents(reports: Sequence[Report]) -> list[dict[str, object]]:
    """Return reports as plain values for JSON."""
    return [
        {
            "letter": report.letter,
            "name": report.name,
            "conforms": not report.failures,
            "checks": [
                {"check": each.check, "promise": each.promise, **asdict(each.outcome)}
                for each in report.results
            ],
        }
        for report in reports
    ]


def conform_page(reports: Sequence[Report], settings: Mapping[str, object]) -> str:
    """Return the page: a line per check, what to do below each that failed, and a sum."""
    lines: list[str] = []
    for report in reports:
        shape = " ".join(f"{key}={value}" for key, value in settings.items() if value != {})
        at = f", at {shape}" if shape else ""
        lines += [f"Mixer {report.letter}, {report.name}{at}"]
        for result in report.results:
            lines += result_lines(result)
        lines += ["", sum_of(report), ""]
    return "\n".join(lines[:-1])


def result_lines(result: Result) -> list[str]:
    """Return the lines of one check."""
    outcome = result.outcome
    if outcome.verdict == "does not apply":
        return paragraph(MARKS[outcome.verdict], result.check, f"does not apply: {outcome.advice}")
    lines = paragraph(MARKS[outcome.verdict], result.check, outcome.measured)
    if outcome.verdict == "failed":
        lines += paragraph("", "must be", outcome.bound)
        lines += paragraph("", "promised", result.promise)
        lines += paragraph("", "look at", outcome.advice)
    return lines


def paragraph(mark: str, label: str, text: str) -> list[str]:
    """Return a mark, a label and a text beside them, wrapped."""
    head = f"  {mark:<7} {label:<{LABEL}} "
    wrapped = textwrap.wrap(
        text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False
    ) or [""]
    return [
        f"{head if number == 0 else ' ' * len(head)}{line}".rstrip()
        for number, line in enumerate(wrapped)
    ]


def sum_of(report: Report) -> str:
    """Return how many promises are kept."""
    verdicts = [result.outcome.verdict for result in report.results]
    text = f"{verdicts.count('passed')} checks passed, {verdicts.count('failed')} failed"
    idle = verdicts.count("does not apply")
    return f"{text}, {idle} {'does' if idle == 1 else 'do'} not apply" if idle else text
