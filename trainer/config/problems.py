"""Turns schema errors into sentences that name key, value, reason and remedy.

Near misses are found by spelling and by synonym: people bring `learning_rate`, `batch_size` and
`seq_len` from other systems.
"""

import difflib
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.section import Section

SYNONYMS = {
    "learning_rate": "optimizer.peak_lr",
    "lr": "optimizer.peak_lr",
    "max_lr": "optimizer.peak_lr",
    "betas": "optimizer.beta1",
    "eps": "optimizer.epsilon",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "gradient_clipping": "optimizer.clip",
    "warmup": "optimizer.warmup_steps",
    "scheduler": "optimizer.schedule",
    "lr_schedule": "optimizer.schedule",
    "batch_size": "train.tokens_per_step",
    "global_batch_size": "train.tokens_per_step",
    "micro_batch_size": "train.microbatch_rows",
    "microbatch_size": "train.microbatch_rows",
    "max_steps": "train.steps",
    "iterations": "train.steps",
    "precision": "train.compute_dtype",
    "dtype": "train.compute_dtype",
    "gradient_checkpointing": "train.activation_checkpointing",
    "eval_interval": "train.validate_every_steps",
    "eval_every": "train.validate_every_steps",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "context_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "dataset": "data.source",
    "vocab_size": "data.vocabulary_size",
    "hidden_size": "model.width",
    "dim": "model.width",
    "d_model": "model.width",
    "n_embd": "model.width",
    "depth": "model.layers",
    "n_layer": "model.layers",
    "num_layers": "model.layers",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "n_kv_heads": "model.kv_heads",
    "ffn_dim": "model.ffn_width",
    "intermediate_size": "model.ffn_width",
    "rope_theta": "model.rope_base",
    "qk_norm": "model.query_key_norm",
    "attn_implementation": "model.attention_backend",
    "attention_implementation": "model.attention_backend",
    "save_every": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "log_interval": "observe.log_every_steps",
    "output_dir": "run.dir",
}
"""Names of other systems and what they are called here."""

LONGEST_SHOWN = 200
"""Characters of a value that a message repeats."""


def all_settings() -> dict[str, str]:
    """Return every setting, as `section.key`, with its docstring."""
    return {
        f"{section}.{key}": " ".join((leaf.description or "").split())
        for section, kind in sections().items()
        for key, leaf in kind.model_fields.items()
    }


def sections() -> dict[str, type[Section]]:
    """Return the sections of a recipe by name."""
    kinds = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    return {
        name: kind
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, Section)
    }


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def describe(error: ValidationError) -> list[tuple[str, str]]:
    """Return one (dotted key, message) for each setting that the schema refuses."""
    found: dict[str, str] = {}
    for details in error.errors():
        key = dotted(details)
        # A value refused by every member of a union comes once per member: one message is enough.
        found.setdefault(key, sentence(key, details))
    return list(found.items())


def dotted(details: ErrorDetails) -> str:
    """Return `section.key` of an error, with the index of a list entry, without union markers."""
    # Section and setting as they are typed, whatever that is; labels are only below them.
    named, below = details["loc"][:2], details["loc"][2:]
    parts = [part for part in below if isinstance(part, int) or is_setting_name(part)]
    return ".".join(str(part) for part in (*named, *parts))


def is_setting_name(part: str) -> bool:
    """Whether a location is a name of ours and not pydantic's label of a union member."""
    return part.isidentifier() and part not in {"str", "int", "float", "bool"}


def sentence(key: str, details: ErrorDetails) -> str:
    """Word one schema error."""
    if details["type"] == "extra_forbidden":
        return unknown(key, details["input"])
    shown = brief(details["input"])
    documentation = all_settings().get(key, "")
    meaning = f" ({documentation.rstrip('.')})" if documentation else ""
    return f"{key}={shown}: {reason(key, details)}{meaning}; {remedy(key, details)}"


def unknown(key: str, value: object) -> str:
    """Word an unknown section or setting, with the nearest known one."""
    section, _, leaf = key.partition(".")
    if section not in sections():
        known = ", ".join(sections())
        hint = near_miss(section, sections())
        return f"{section}: there is no such section{hint}; the sections are {known}"
    synonym = SYNONYMS.get(leaf)
    siblings = sections()[section].model_fields
    elsewhere = [setting for setting in all_settings() if setting.split(".")[1] == leaf]
    close = difflib.get_close_matches(leaf, list(siblings), n=1, cutoff=0.6)
    if synonym or elsewhere:
        hint = f"; here it is called {synonym or elsewhere[0]}"
    elif close:
        hint = f"; did you mean {section}.{close[0]}?"
    else:
        hint = f"; settings of [{section}]: {', '.join(siblings)}"
    return f"{key}={brief(value)}: there is no such setting{hint}"


def reason(key: str, details: ErrorDetails) -> str:
    """Say why the schema refuses a value."""
    limits = details.get("ctx", {})
    match details["type"]:
        case "greater_than_equal":
            return f"must be {limits['ge']} or more"
        case "greater_than":
            return f"must be more than {limits['gt']}"
        case "less_than_equal":
            return f"must be {limits['le']} or less"
        case "less_than":
            return f"must be less than {limits['lt']}"
        case "literal_error":
            return f"must be one of {limits['expected']}"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_type":
            return "must be a number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "model_type":
            return f"must be a table; write [{key}]"
        case "missing":
            return "is missing"
        case "finite_number":
            return "must be a finite number"
        case _:
            return details["msg"][0].lower() + details["msg"][1:]


def remedy(key: str, details: ErrorDetails) -> str:
    """Say what to type instead."""
    value = details["input"]
    if (
        details["type"] in {"int_type", "int_from_float"}
        and isinstance(value, float)
        and value.is_integer()
    ):
        return f"type {key}={int(value)}"
    if details["type"] == "bool_type" and str(value).lower() in {
        "true",
        "false",
        "yes",
        "no",
        "on",
        "off",
    }:
        return f"type {key}={'true' if str(value).lower() in {'true', 'yes', 'on'} else 'false'}"
    if details["type"] == "literal_error":
        choices = [
            choice.strip(" '")
            for choice in str(details.get("ctx", {})["expected"]).replace(" or ", ",").split(",")
        ]
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        return f"type {key}={(close or choices)[0]}"
    section, _, leaf = key.partition(".")
    info = sections()[section].model_fields.get(leaf) if section in sections() else None
    if info is not None and info.default is None:
        return f"type {key}=none for the default"
    if info is None:
        return "see `interlace plan --help` for what a recipe may hold"
    return f"the default is {key}={show(info.default)}"


def brief(value: object) -> str:
    """Return a value as it would be typed; of a very long one, the beginning."""
    text = show(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def show(value: object) -> str:
    """Return a value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(show(entry) for entry in value) + "]"
    return f'"{value}"' if value == "" else str(value)
