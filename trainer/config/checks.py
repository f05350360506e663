"""What the schema alone cannot see: small named checks over settings that depend on each other.

Every check returns None or one message with key, value, reason and remedy; a user sees all of them
at once, together with what the schema refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from interlace.trainer.config.checkpoint_checks import kept_steps_are_saved
from interlace.trainer.config.clip_checks import (
    clipped_sgd_clips,
    nesterov_has_momentum,
    overlap_is_exact,
    quantile_is_known_in_time,
    quantile_is_of_what_is_clipped,
)
from interlace.trainer.config.data_checks import branch_has_its_step, gaps_go_forward
from interlace.trainer.config.guard_checks import host_state_exists, spikes_are_known_in_time
from interlace.trainer.config.model_checks import (
    experts_are_as_many_as_chosen,
    experts_are_weighed,
    mamba_groups_divide_heads,
    mamba_heads_divide_inner_width,
)
from interlace.trainer.config.mup_checks import (
    mup_has_its_base,
    rules_are_left_out_of_something,
    threshold_follows_the_width,
)
from interlace.trainer.config.parallel_checks import (
    deepspeed_config_has_its_engine,
    zero_3_differentiates_once,
    zero_checks_no_idle_state,
    zero_clips_by_the_norm,
    zero_has_no_replicas,
    zero_has_the_diagnostics,
    zero_has_the_rule,
    zero_keeps_state_in_float32,
    zero_overlaps_no_update,
    zero_reaches_all_it_trains,
    zero_recomputes_no_gradients,
    zero_stage_has_its_engine,
)
from interlace.trainer.config.problems import describe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.config.secret_checks import recipe_holds_no_secret
from interlace.trainer.config.sharpness_checks import (
    sharpness_has_its_derivative,
    sharpness_rules_are_known,
)
from interlace.trainer.config.watchdog_checks import (
    stragglers_are_slower_than_the_median,
    watchdog_leaves_time_for_a_phase,
)
from interlace.trainer.errors import ConfigError

MOST_THREADS = 1024
MOST_SLOTS = 64


def validate(tables: Mapping[str, object]) -> RunConfig:
    """Check section tables against the schema and all named checks.

    Raises:
        ConfigError: Every problem at once.
    """
    try:
        config = RunConfig.model_validate(tables)
    except ValidationError as error:
        refused = describe(error)
        problems = [text for _, text in refused]
        # The other settings are checked as if the refused ones had been left out.
        keys = [key for key, _ in refused]
        rest = failed_checks(RunConfig.model_validate(without(tables, keys)))
        problems += [text for text in rest if not any(key in text for key in keys)]
        raise ConfigError(problems) from None
    problems = failed_checks(config)
    if problems:
        raise ConfigError(problems)
    return config


def without(tables: Mapping[str, object], keys: list[str]) -> dict[str, object]:
    """Return `tables` less the refused settings."""
    kept: dict[str, object] = {}
    for section, values in tables.items():
        if section in keys or not isinstance(values, dict):
            continue
        kept[section] = {
            key: value
            for key, value in cast(dict[str, object], values).items()
            if not any(
                refused == f"{section}.{key}" or refused.startswith(f"{section}.{key}.")
                for refused in keys
            )
        }
    return kept


def failed_checks(config: RunConfig) -> list[str]:
    """Return the message of every check that fails."""
    return [text for check in CHECKS if (text := check(config)) is not None]


def heads_divide_width(config: RunConfig) -> str | None:
    """Heads share the width evenly unless the head width is given."""
    model = config.model
    spare = model.width % model.heads
    if model.head_width is not None or not spare:
        return None
    nearest = [model.width - spare, model.width - spare + model.heads]
    choices = " or ".join(f"model.width={width}" for width in nearest if width > 0)
    return (
        f"model.width={model.width}: does not split into model.heads={model.heads} heads; "
        f"type {choices}, or give model.head_width"
    )


def head_width_is_even(config: RunConfig) -> str | None:
    """Rotary embedding turns pairs of coordinates."""
    model = config.model
    if model.head_width is None and model.width % model.heads:
        return None
    width = model.head_width or model.width // model.heads
    if width % 2 == 0:
        return None
    return (
        f"model.head_width={width}: rotary position embedding turns pairs of coordinates, so it "
        "must be "
        f"even; type model.head_width={width + 1}"
    )


def kv_heads_divide_heads(config: RunConfig) -> str | None:
    """Every key head serves the same number of query heads."""
    model = config.model
    if model.kv_heads is None or model.heads % model.kv_heads == 0:
        return None
    divisors = [str(n) for n in range(1, model.heads + 1) if model.heads % n == 0]
    return (
        f"model.kv_heads={model.kv_heads}: must divide model.heads={model.heads}; "
        f"type one of model.kv_heads={', '.join(divisors)}"
    )


def plugins_are_loaded(config: RunConfig) -> str | None:
    """Files of plug-ins exist and can be imported; what they register is known from here on."""
    from interlace.trainer.registry import load_plugins

    try:
        load_plugins(config.model.plugins)
    except ConfigError as error:
        return error.problems[0]
    return None


def objective_is_known(config: RunConfig) -> str | None:
    """The objective is registered."""
    from interlace.trainer.objectives import OBJECTIVES

    name = config.train.objective
    return None if name in OBJECTIVES.names() else OBJECTIVES.unknown(name)


def rule_is_known(config: RunConfig) -> str | None:
    """The update rule is registered."""
    from interlace.trainer.rules import RULES

    name = config.optimizer.rule
    return None if name in RULES.names() else RULES.unknown(name)


def diagnostics_are_known(config: RunConfig) -> str | None:
    """Every diagnostic is registered."""
    from interlace.trainer.diagnostics import DIAGNOSTICS

    unknown = [name for name in config.observe.diagnostics if name not in DIAGNOSTICS.names()]
    return DIAGNOSTICS.unknown(unknown[0]) if unknown else None


def pattern_is_known(config: RunConfig) -> str | None:
    """Every letter of the pattern names a registered block."""
    from interlace.trainer.models.depth import layer_patterns
    from interlace.trainer.models.registry import registered_letters

    known = registered_letters()
    try:
        letters = "".join(layer_patterns(config.model))
    except ConfigError as error:
        return error.problems[0]
    except ValueError as error:
        return (
            f"model.pattern={config.model.pattern}: {error}; write layers as words, as in "
            "model.pattern='AF MF*3'"
        )
    unknown = [letter for letter in dict.fromkeys(letters) if letter not in known]
    if not unknown:
        return None
    return (
        f"model.pattern={config.model.pattern}: no block is registered as {', '.join(unknown)}; "
        "known letters: "
        f"{', '.join(f'{letter} ({name})' for letter, name in sorted(known.items()))}"
    )


def step_holds_whole_rows(config: RunConfig) -> str | None:
    """A step is a whole number of rows."""
    length, tokens = config.data.sequence_length, config.train.tokens_per_step
    if tokens % length == 0:
        return None
    lower = tokens - tokens % length
    choices = " or ".join(str(n) for n in (lower, lower + length) if n > 0)
    return (
        f"train.tokens_per_step={tokens}: is not a multiple of data.sequence_length={length}, "
        f"so a step would end inside a row; type train.tokens_per_step={choices}"
    )


def validation_holds_a_row(config: RunConfig) -> str | None:
    """A validation reads at least one row."""
    length, tokens = config.data.sequence_length, config.train.validation_tokens
    if tokens >= length:
        return None
    return (
        f"train.validation_tokens={tokens}: is less than one row of data.sequence_length={length}; "
        f"type train.validation_tokens={length}"
    )


def mixture_has_sources(config: RunConfig) -> str | None:
    """A list of sources is not empty."""
    if config.data.source == "" or config.data.source == []:
        return 'data.source="": there is nothing to train on; type data.source=stdlib'
    return None


def stride_has_its_strategy(config: RunConfig) -> str | None:
    """A stride means something to one strategy."""
    if config.offload.stride is None or config.offload.strategy == "stride":
        return None
    return (
        f"offload.stride={config.offload.stride}: offload.strategy={config.offload.strategy} does "
        "not use it; type offload.strategy=stride or offload.stride=none"
    )


def trace_span_is_not_empty(config: RunConfig) -> str | None:
    """A span of steps goes forward, from 1."""
    span = config.observe.trace_steps
    if span is None:
        return None
    first, last = (int(word) for word in span.split(":"))
    if 1 <= first < last:
        return None
    return (
        f"observe.trace_steps={span}: holds no step; type first:last with first at least 1 and "
        f"last above it, such as observe.trace_steps={max(1, first)}:{max(1, first) + 3}"
    )


def trace_span_is_reached(config: RunConfig) -> str | None:
    """A span that begins after the last step would trace nothing; one that goes on beyond it is
    told of at the end of the run.
    """
    span, steps = config.observe.trace_steps, config.train.steps
    if span is None or "steps" not in config.train.model_fields_set:
        return None
    first, last = (int(word) for word in span.split(":"))
    if not steps < first < last:
        return None
    start = max(1, steps + 1 - (last - first))
    return (
        f"observe.trace_steps={span}: begins after the last of train.steps={steps}, so no update "
        f"would be traced; type observe.trace_steps={start}:{steps + 1} or observe.trace_steps=none"
    )


def offload_is_of_human_size(config: RunConfig) -> str | None:
    """Threads and slots that no machine has are slips of the hand."""
    offload = config.offload
    for key, value, most, why in (
        ("cpu_threads", offload.cpu_threads, MOST_THREADS, "more threads than any host has cores"),
        (
            "staging_slots",
            offload.staging_slots,
            MOST_SLOTS,
            "each costs device memory, and two keep both copy directions busy",
        ),
    ):
        if value is not None and value > most:
            default = "none" if key == "cpu_threads" else "2"
            return (
                f"offload.{key}={value}: must be {most} or less ({why}); type "
                f"offload.{key}={default}"
            )
    return None


def tokenizer_exists(config: RunConfig) -> str | None:
    """A tokenizer that is not built in is a file that exists."""
    name = config.data.tokenizer
    if name in {"bytes", "bpe"} or Path(name).expanduser().is_file():
        return None
    return (
        f"data.tokenizer={name}: is neither `bytes` nor `bpe`, and there is no such file; "
        f"type data.tokenizer=bytes or the path of a tokenizer.json"
    )


def end_of_text_has_its_tokenizer(config: RunConfig) -> str | None:
    """Tokenizers that are made here have an end-of-text token of their own."""
    data = config.data
    if data.end_of_text is None or data.tokenizer not in {"bytes", "bpe"}:
        return None
    return (
        f"data.end_of_text={data.end_of_text}: data.tokenizer={data.tokenizer} is made here and "
        "has its own; type data.end_of_text=none or the path of a tokenizer.json"
    )


CHECKS: tuple[Callable[[RunConfig], str | None], ...] = (
    heads_divide_width,
    head_width_is_even,
    kv_heads_divide_heads,
    plugins_are_loaded,
    pattern_is_known,
    mamba_heads_divide_inner_width,
    mamba_groups_divide_heads,
    experts_are_as_many_as_chosen,
    experts_are_weighed,
    objective_is_known,
    rule_is_known,
    diagnostics_are_known,
    sharpness_rules_are_known,
    sharpness_has_its_derivative,
    step_holds_whole_rows,
    validation_holds_a_row,
    mixture_has_sources,
    recipe_holds_no_secret,
    gaps_go_forward,
    branch_has_its_step,
    tokenizer_exists,
    end_of_text_has_its_tokenizer,
    overlap_is_exact,
    quantile_is_known_in_time,
    spikes_are_known_in_time,
    host_state_exists,
    quantile_is_of_what_is_clipped,
    clipped_sgd_clips,
    nesterov_has_momentum,
    kept_steps_are_saved,
    stride_has_its_strategy,
    trace_span_is_not_empty,
    trace_span_is_reached,
    offload_is_of_human_size,
    mup_has_its_base,
    rules_are_left_out_of_something,
    threshold_follows_the_width,
    watchdog_leaves_time_for_a_phase,
    stragglers_are_slower_than_the_median,
    zero_stage_has_its_engine,
    deepspeed_config_has_its_engine,
    zero_has_no_replicas,
    zero_has_the_rule,
    zero_clips_by_the_norm,
    zero_keeps_state_in_float32,
    zero_overlaps_no_update,
    zero_recomputes_no_gradients,
    zero_checks_no_idle_state,
    zero_has_the_diagnostics,
    zero_3_differentiates_once,
    zero_reaches_all_it_trains,
)
