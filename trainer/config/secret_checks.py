"""No secrets in recipes: a run folder keeps its recipe, and people share run folders.

Passwords inside addresses, signed addresses and the tokens of well-known services are recognised by
their form. Libraries find credentials in their own places (`HF_TOKEN`, `~/.netrc`,
`~/.cache/huggingface/token`), which nothing here reads or writes.
"""

import re
from collections.abc import Iterator
from typing import cast

from interlace.trainer.config.schema import RunConfig

SECRETS = {
    "a password in an address": re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"),
    "a signature or token in an address": re.compile(
        r"://\S+[?&](?:[a-z-]*token|x-amz-signature|x-goog-signature|sig|api_?key|password)=",
        re.IGNORECASE,
    ),
    "a token": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
        r"|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}|xox[abp]-[\w-]{10,})"
    ),
}
"""What gives a secret away, by what it is called."""


def recipe_holds_no_secret(config: RunConfig) -> str | None:
    """Nothing in a recipe is a credential."""
    for key, text in texts_of(config.model_dump()):
        for what, form in SECRETS.items():
            if form.search(text):
                return (
                    f"{key}: holds {what}, and the run folder would keep it; leave it out and let "
                    "the library find it (HF_TOKEN, ~/.netrc, or a file that you download yourself)"
                )
    return None


def texts_of(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of nested tables and lists with the key that leads to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in cast(dict[str, object], value).items():
            yield from texts_of(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, (list, tuple)):
        for inner in cast(list[object], value):
            yield from texts_of(inner, key)
