"""`interlace plan` as a table: one page that a person reads before starting a run."""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

from interlace.launch.offload_table import offload_lines
from interlace.launch.typeset import typeset
from interlace.offload.hardware import HardwareProfile
from interlace.offload.measure import known_profile
from interlace.trainer.config import RunConfig
from interlace.trainer.config.load import Recipe
from interlace.trainer.data.prepare import find_prepared
from interlace.trainer.data.tokenizers import load_tokenizer
from interlace.trainer.errors import ConfigError, DataError
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.observe.units import human_bytes, human_count, human_flops
from interlace.trainer.plan import Plan, Setting, on_ranks

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
    alone = Setting(
        world_size=1,
        device_type="cpu" if hardware.device_name == "CPU" else "cuda",
        vocabulary_size=corpus.index.vocabulary_size if corpus else expected_vocabulary(config),
        corpus_tokens=corpus.tokens("train") if corpus else None,
        hardware=hardware,
    )
    return on_ranks(alone, ranks)


def check_rates(options: Mapping[str, str | None], hardware: HardwareProfile) -> None:
    """Raise `ConfigError` if an option that predicts times was given and the machine's rates are
    unknown.
    """
    if hardware.rates is not None:
        return
    problems = [
        f"--{option} {value}: the profile of {hardware.name or hardware.device_name} has no copy "
        "and update rates (`rates` is null) to predict times with; measure them with "
        "`interlace profile`"
        for option, value in options.items()
        if value
    ]
    if problems:
        raise ConfigError(problems)


def ranks_to_plan_for(config: RunConfig, asked: int | None, swept: Sequence[int]) -> int:
    """Return the number of ranks of the table: as asked; else one, or with a sweep its first that
    divides batch and replicas.

    Raises:
        ConfigError: What was asked is no number of ranks.
    """
    if asked is not None:
        if asked < 1:
            raise ConfigError([f"--ranks {asked}: a run has at least one rank; type --ranks 1"])
        return asked
    rows = config.train.tokens_per_step // config.data.sequence_length
    even = (n for n in swept if not rows % n and not n % config.parallel.replicas)
    return next(even, 1)


def expected_vocabulary(config: RunConfig) -> int:
    """Return the vocabulary a tokenizer will have, before it is trained."""
    match config.data.tokenizer:
        case "bytes":
            return 257
        case "bpe":
            return config.data.vocabulary_size
        case path:
            return load_tokenizer(Path(path).expanduser(), config.data.end_of_text).vocabulary_size


def plan_table(recipe: Recipe, plan: Plan) -> str:
    """Return the table of a plan."""
    config = recipe.config
    sections: dict[str, Sequence[Row]] = {
        "Run": run_rows(config, plan),
        "Model": model_rows(config, plan),
        "Work": work_rows(plan),
    }
    lines = [f"{recipe.name}: {recipe.description}".rstrip(": "), *problem_lines(plan)]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {label:<24} {value}" for label, value in rows)]
    lines += memory_lines(plan)
    lines += offload_lines(plan)
    return "\n".join(lines)


def problem_lines(plan: Plan) -> list[str]:
    """Say at the top, before all else, that a run cannot be."""
    placement = plan.offload
    problems = [*placement.impossible, *(placement.problem or "").splitlines()]
    return [line for problem in problems for line in ("", f"DOES NOT FIT  {problem}")]


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
        ("engine", engine_in_words(plan)),
        (
            "accumulation",
            f"{plan.accumulation} pass(es) of {plan.microbatch_rows} rows on each rank",
        ),
        ("data", f"{named}, tokenizer {config.data.tokenizer}"),
        ("corpus", corpus),
        ("checkpoints", f"{plan.checkpoints} of {human_bytes(plan.checkpoint_bytes)}"),
        ("validations", f"{plan.validations}"),
    ]


def engine_in_words(plan: Plan) -> str:
    """Say what spreads the model over the ranks."""
    if plan.zero_stage is not None:
        return f"DeepSpeed, ZeRO stage {plan.zero_stage}"
    if plan.world_size == 1:
        return "none, one rank"
    return "FSDP2" if plan.replicas == 1 else f"FSDP2 in {plan.replicas} replicas"


def check_engine(config: RunConfig, plan: Plan) -> None:
    """Raise `ConfigError` if the engine cannot train the recipe, or a user's own settings of it
    speak against the recipe.
    """
    if plan.zero_stage is not None:
        from interlace.trainer.engines.zero.opening import require_whole_tensors
        from interlace.trainer.engines.zero.settings import engine_settings
        from interlace.trainer.mup.manifest import manifest_of

        engine_settings(config, plan)
        require_whole_tensors(manifest_of(config, plan.vocabulary_size))


def model_rows(config: RunConfig, plan: Plan) -> list[Row]:
    """Shape and size."""
    return [
        ("blocks", f"{stack_in_words(config)}, width {config.model.width}"),
        ("vocabulary", f"{plan.vocabulary_size:,}"),
        ("parameters", parameters_in_words(plan)),
    ]


def parameters_in_words(plan: Plan) -> str:
    """Return the number of parameters, and of those that one token meets where they are fewer."""
    if plan.active_parameters == plan.parameters:
        return f"{plan.parameters:,}"
    return f"{plan.parameters:,}, {human_count(plan.active_parameters)} active for each token"


def stack_in_words(config: RunConfig) -> str:
    """Return the layers from the first to the last, equal neighbours counted: `MF x 3, AF`."""
    runs = [(word, len(list(same))) for word, same in groupby(layer_patterns(config.model))]
    return ", ".join(f"{word} x {count}" if count > 1 else word for word, count in runs)


def memory_lines(plan: Plan) -> list[str]:
    """Bytes by kind, on the device and on the host."""
    device, host = plan.memory.device.model_dump(), plan.memory.host.model_dump()
    kinds = [kind for kind in dict.fromkeys([*device, *host]) if kind != "total"]
    rows = [
        [f"  {kind.replace('_', ' ')}", *(size(part.get(kind, 0)) for part in (device, host))]
        for kind in kinds
        if device.get(kind) or host.get(kind)
    ]
    there = f"{human_bytes(plan.host_memory_bytes)}"
    if plan.ranks_per_host > 1:
        there += f" for {plan.ranks_per_host} ranks"
    rows.append(["  total", human_bytes(device["total"]), human_bytes(host["total"])])
    rows.append(["  there is", human_bytes(plan.device_memory_bytes), there])
    if plan.device_type == "cpu":
        rows[-1] = ["  there is", f"{there}, in which both have to find room"]
    return ["", *typeset(["Memory of one rank", "device", "host"], rows)]


def size(value: int) -> str:
    """Return a size, or a dash for nothing."""
    return human_bytes(value) if value else "-"


def work_rows(plan: Plan) -> list[Row]:
    """FLOPs."""
    forward, backward = plan.forward_flops_per_token, plan.backward_flops_per_token
    return [
        ("work per token", f"{human_flops(forward)} forward, {human_flops(backward)} backward"),
        ("work per step", human_flops(plan.flops_per_token * plan.tokens_per_step)),
        ("work in all", human_flops(plan.total_flops)),
    ]
