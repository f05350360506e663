"""The command behind `interlace bench longctx`: what was asked for, checked, measured, shown."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict

import torch

from interlace.launch.longctx.comparison import LEAST_REPEATS, leads
from interlace.launch.longctx.contenders import contenders, remarks
from interlace.launch.longctx.measuring import Session, measure
from interlace.launch.longctx.picture import draw
from interlace.launch.longctx.table import longctx_page
from interlace.launch.output_files import picture_file
from interlace.trainer.config import list_recipes
from interlace.trainer.errors import ConfigError

LENGTHS = {"cpu": "256,512,1024,2048,4096", "cuda": "1024,2048,4096,8192,16384,32768,65536"}
DECODE_TOKENS = {"cpu": 16, "cuda": 64}
BUDGET = {"cpu": 60.0, "cuda": 120.0}


def longctx(arguments: Namespace, progress: Callable[[int, int], None]) -> int:
    """Measure models side by side over growing contexts.

    Args:
        arguments: As parsed.
        progress: Told of rounds done, and of all.

    Raises:
        ConfigError: The request makes no sense; nothing was measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word] + arguments.overrides
    if not names:
        known = ", ".join(list_recipes())
        raise ConfigError([f"bench longctx needs a recipe ({known}, or a TOML file) or a run"])
    lengths = parse_lengths(arguments.lengths or LENGTHS[device.type])
    decode_tokens = DECODE_TOKENS[device.type] if arguments.decode is None else arguments.decode
    budget = BUDGET[device.type] if arguments.budget is None else arguments.budget
    check_numbers(decode_tokens, arguments.repeats, budget)
    picture = picture_file("--picture", arguments.picture) if arguments.picture else None
    found = contenders(names, overrides, arguments.vocabulary, device)
    session = Session(
        lengths=lengths,
        repeats=arguments.repeats,
        decode_tokens=decode_tokens,
        vocabulary=found[0].model.embedding.num_embeddings,
        budget=budget,
        device=device,
    )
    samples = measure(found, session, progress)
    notes = remarks(found, arguments.vocabulary)
    if picture:
        draw(samples, picture)
    if arguments.json:
        models = [
            {
                "name": each.name,
                "blocks": each.blocks,
                "parameters": each.parameters,
                "trained": each.trained,
            }
            for each in found
        ]
        document = {
            "device": str(device),
            "vocabulary": session.vocabulary,
            "decode_tokens": decode_tokens,
            "repeats": session.repeats,
            "models": models,
            "notes": notes,
            "samples": [asdict(sample) for sample in samples],
            "leads": [asdict(lead) for lead in leads(samples)],
        }
        print(json.dumps(document, indent=2))
        return 0
    print(longctx_page(found, samples, session, notes))
    if picture:
        print(f"\npicture  {picture}")
    return 0


def parse_lengths(text: str) -> tuple[int, ...]:
    """Return the lengths that a text lists, ascending.

    Raises:
        ConfigError: It lists anything else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(
            [
                f"--lengths {text}: must be whole numbers of tokens with commas between; type "
                "--lengths 256,512,1024"
            ]
        )
    return tuple(sorted({int(word) for word in words}))


def check_numbers(decode_tokens: int, repeats: int, budget: float) -> None:
    """Raise `ConfigError` for numbers that nothing can be measured with."""
    problems: list[str] = []
    if decode_tokens < 1:
        problems.append(f"--decode {decode_tokens}: must be 1 or more; type --decode 16")
    if repeats < LEAST_REPEATS:
        problems.append(
            f"--repeats {repeats}: fewer than {LEAST_REPEATS} rounds give no interval; type "
            f"--repeats {LEAST_REPEATS}"
        )
    if not budget > 0:
        problems.append(f"--budget {budget:g}: must be more than 0 seconds; type --budget 60")
    if problems:
        raise ConfigError(problems)
