"""`interlace plan` as a table: one page that a person reads before starting a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from interlace.launch.offload_table import offload_lines
from interlace.offload.hardware import HardwareProfile
from interlace.offload.measure import known_profile
from interlace.trainer.config import RunConfig
from interlace.trainer.config.load import Recipe
from interlace.trainer.data.prepare import find_prepared
from interlace.trainer.data.tokenizers import load_tokenizer
from interlace.trainer.errors import DataError
from interlace.trainer.observe.units import human_bytes, human_count
from interlace.trainer.plan import Plan, Setting

Row = tuple[str, str]


def this_machine() -> HardwareProfile:
    """Return the profile of this machine; it is measured the first time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return known_profile(device, lambda text: print(text, file=sys.stderr))


def make_setting(config: RunConfig, ranks: int, hardware: HardwareProfile) -> Setting:
    """Return what a plan depends on; the corpus is looked at only if it is prepared already."""
    try:
        corpus = find_prepared(config.data)
    except DataError:
        # What a plan is for includes recipes whose text is not on this machine.
        corpus = None
    per_node = hardware.rates.ranks_per_node if hardware.rates else ranks
    on_gpu = hardware.device_name != "CPU"
    return Setting(
        world_size=ranks,
        device_type="cuda" if on_gpu else "cpu",
        vocabulary_size=corpus.index.vocabulary_size if corpus else expected_vocabulary(config),
        corpus_tokens=corpus.tokens("train") if corpus else None,
        hardware=hardware,
        ranks_per_host=min(ranks, per_node) if on_gpu else ranks,
    )


def expected_vocabulary(config: RunConfig) -> int:
    """Return the vocabulary a tokenizer will have, before it is trained."""
    match config.data.tokenizer:
        case "bytes":
            return 257
        case "bpe":
            return config.data.vocabulary_size
        case path:
            return load_tokenizer(Path(path).expanduser()).vocabulary_size


def plan_table(recipe: Recipe, plan: Plan) -> str:
    """Return the table of a plan."""
    config = recipe.config
    sections: dict[str, Sequence[Row]] = {
        "Run": run_rows(config, plan),
        "Model": model_rows(config, plan),
        "Memory of one rank": memory_rows(plan),
        "Work": work_rows(plan),
    }
    lines = [f"{recipe.name}: {recipe.description}".rstrip(": ")]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {label:<24} {value}" for label, value in rows)]
    lines += offload_lines(plan)
    return "\n".join(lines)


def run_rows(config: RunConfig, plan: Plan) -> list[Row]:
    """Steps, batch, data."""
    if plan.corpus_tokens is None:
        corpus = "not prepared yet; `interlace prepare` or `train` does it"
    else:
        corpus = f"{plan.corpus_tokens:,} tokens, {plan.epochs:.2f} epochs"
    source = config.data.source
    named = source if isinstance(source, str) else ", ".join(part.source for part in source)
    return [
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.total_tokens:,}"),
        (
            "tokens per step",
            f"{plan.tokens_per_step:,} ({plan.rows_per_step} rows of {plan.sequence_length})",
        ),
        ("ranks", f"{plan.world_size} ({plan.device_type}, {plan.compute_dtype})"),
        (
            "accumulation",
            f"{plan.accumulation} pass(es) of {plan.microbatch_rows} rows on each rank",
        ),
        ("data", f"{named}, tokenizer {config.data.tokenizer}"),
        ("corpus", corpus),
        ("checkpoints", f"{plan.checkpoints} of {human_bytes(plan.checkpoint_bytes)}"),
        ("validations", f"{plan.validations}"),
    ]


def model_rows(config: RunConfig, plan: Plan) -> list[Row]:
    """Shape and size."""
    return [
        ("blocks", f"{config.model.pattern} x {config.model.layers}, width {config.model.width}"),
        ("vocabulary", f"{plan.vocabulary_size:,}"),
        ("parameters", f"{plan.parameters:,}"),
    ]


def memory_rows(plan: Plan) -> list[Row]:
    """Bytes by kind."""
    kinds = [(name.replace("_", " "), value) for name, value in plan.memory if value]
    kinds.sort(key=lambda kind: kind[0].startswith("host"))
    rows = [(name, human_bytes(value)) for name, value in kinds]
    of = "GPU" if plan.device_type == "cuda" else "host"
    total = f"{human_bytes(plan.memory.total)} of {human_bytes(plan.device_memory_bytes)} ({of})"
    return [*rows, ("total on the device", total)]


def work_rows(plan: Plan) -> list[Row]:
    """FLOPs."""
    forward, backward = plan.forward_flops_per_token, plan.backward_flops_per_token
    return [
        ("FLOPs per token", f"{human_count(forward)} forward, {human_count(backward)} backward"),
        ("FLOPs per step", human_count(plan.flops_per_token * plan.tokens_per_step)),
        ("FLOPs in all", human_count(plan.total_flops)),
    ]
