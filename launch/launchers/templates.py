"""Jobs for schedulers, filled from `launch/templates`.

A template is the job as one would write it by hand, with `@{NAME}` where a value goes; `@` since
`$` belongs to the shell. What goes in is quoted by who puts it there, for the language it lands in,
and never read again.
"""

import json
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from string import Template

from interlace.trainer.errors import ConfigError


class Job(Template):
    """A template whose places are spelled `@{NAME}`; `@@` is one `@`."""

    delimiter = "@"
    braceidpattern = r"[A-Z_]+"
    # Without braces nothing is a place, but a mistake.
    idpattern = r"(?!)"


def filled(name: str, values: Mapping[str, str]) -> str:
    """Return a template of `launch/templates` with every place filled and every value used."""
    folder = resources.files("interlace.launch.templates")
    template = Job((folder / name).read_text(encoding="utf-8"))
    unused = set(values) - set(template.get_identifiers())
    assert not unused, f"{name} has no place for {unused}"
    return template.substitute(values)


def in_yaml(text: str) -> str:
    """Return a text as a YAML scalar: JSON's strings are YAML's."""
    return json.dumps(text)


def in_block(text: str, spaces: int) -> str:
    """Return lines for a literal block of YAML that is indented so far."""
    return text.rstrip("\n").replace("\n", "\n" + " " * spaces)


def in_shell(*words: str) -> str:
    """Return words as a shell reads them back."""
    return shlex.join(words)


LETTERS = {
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, dots, dashes and underscores"),
    "label": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and dashes"),
    "path": (r"[A-Za-z0-9/._+=,@:-]+", "letters, digits and /._+=,@:-, for Slurm's sake"),
    "image": (r"[A-Za-z0-9][A-Za-z0-9/._:@-]*", "an image, as in REPOSITORY/IMAGE:TAG"),
    "accelerators": (r"[A-Za-z0-9-]+:[0-9]+", "NAME:N, as in H100:8"),
    "time": (r"([0-9]+-)?[0-9]{1,3}(:[0-9]{2}){0,2}", "[D-]H:M:S, as in 24:00:00"),
}
"""Forms of values that land in places where no quotes help, and each in words."""


def misspelled(option: str, value: str | None, form: str) -> list[str]:
    """Return what is wrong with a value that a scheduler reads; an absent one is right."""
    pattern, words = LETTERS[form]
    if value is None or re.fullmatch(pattern, value):
        return []
    return [f"{option} {value}: must be {words}"]


def job_name(run_name: str) -> str:
    """Return the name of a run as Kubernetes and SkyPilot want names (RFC 1123)."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:40].rstrip("-")
    if not name:
        raise ConfigError([f"run.name={run_name}: has no letter that a job may be named by"])
    return name
