"""Builds a run from a recipe, in the order in which things can go wrong cheaply, and closes it with
pictures.

Folder and corpus first, then the plan, the model, and the newest checkpoint; `finish_report` writes
what a person looks at afterwards.
"""

import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch

from interlace.offload.cores import bind_rank, local_ranks
from interlace.offload.hardware import HardwareProfile, profile_hardware, with_active_ranks
from interlace.offload.measure import known_profile
from interlace.trainer.attention_choice import check_attention
from interlace.trainer.batches import StepBatches
from interlace.trainer.checkpoint.state import Progress, TrainingState, load_newest
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.contract import ENVIRONMENT_NAME, contract_note, read_environment
from interlace.trainer.data.prepare import TOKENIZER_NAME, prepare
from interlace.trainer.data.rows import TrainingRows, ValidationRows
from interlace.trainer.data.shards import PreparedCorpus
from interlace.trainer.data.tokenizers import load_tokenizer
from interlace.trainer.diagnostics import diagnostics_of
from interlace.trainer.engines import builder_of
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.host_needs import require_host_memory
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import MANIFEST_NAME, Manifest, differences, manifest_of
from interlace.trainer.mup.parametrise import parametrise
from interlace.trainer.objectives import Freezes, Objective, objective_of
from interlace.trainer.observe.console import Console
from interlace.trainer.observe.environment import describe_environment
from interlace.trainer.observe.metrics import METRICS_NAME, MetricsWriter, read_metrics
from interlace.trainer.observe.offload_log import engine_messages
from interlace.trainer.observe.plots import write_loss_curve
from interlace.trainer.observe.report import write_report
from interlace.trainer.observe.traces import PICTURE_NAME, TRACE_NAME, UpdateTraces
from interlace.trainer.parallel import (
    cast_weights,
    compile_layers,
    compiles,
    compute_dtype_of,
    recompute_layers,
)
from interlace.trainer.parts import Parts
from interlace.trainer.plan import Plan, Setting, resolve
from interlace.trainer.rendezvous import agree, digest_of
from interlace.trainer.run import Run
from interlace.trainer.run_folder import (
    RunFolder,
    begin_attempt,
    config_text,
    keep_plugins,
    open_run_folder,
    write_atomically,
    write_json,
)
from interlace.trainer.sampling import SamplingSettings
from interlace.trainer.saved_model import load_saved_model
from interlace.trainer.signals import StopRequest
from interlace.trainer.starting_weights import start_from
from interlace.trainer.world import World

PICTURE_SECONDS = 10.0
"""With less time than this before the process has to be gone, no pictures are drawn."""


@contextmanager
def open_run(
    config: RunConfig,
    world: World,
    stop: StopRequest | None = None,
    began: Callable[[RunFolder, int], Heartbeat] | None = None,
) -> Generator[Run]:
    """Build a run, yield it, close what was opened also when a step fails, and leave pictures
    behind; `began` is told of the folder and the number of the attempt.
    """
    parts, progress, notes = assemble(config, world, began)
    with ExitStack() as stack:
        log_every = config.observe.log_every_steps
        console = stack.enter_context(Console(parts.plan.steps, log_every, world.is_main))
        for note in notes:
            console.note(note)
        metrics = None
        if world.is_main:
            # A start that was overtaken while it was built must leave the newer one's files alone.
            # Once they are open, those of an older start are other files, which nobody reads.
            parts.folder.store.require_live(parts.attempt)
            metrics = stack.enter_context(MetricsWriter(parts.folder.path, progress.step))
        stack.enter_context(engine_messages(console, parts.folder.path))
        stop = stop or StopRequest(world.is_main, config.checkpoint.notice_seconds)
        stack.enter_context(stop)
        run = Run(parts, progress, console, metrics, stop)
        traces = trace_updates(parts, console)
        try:
            yield run
            # With overlap the last update is complete, but nobody has asked for its report.
            parts.state.engine.finish_report()
        finally:
            run.saving.close()
            traces.close()
            parts.state.engine.close()
            console.close()
            if metrics is not None:
                metrics.close()
                if stop.seconds_left >= PICTURE_SECONDS:
                    leave_pictures(parts.folder, parts.attempt)
        if world.is_main:
            conclude(run)
    world.barrier()


def trace_updates(parts: Parts, console: Console) -> UpdateTraces:
    """Let rank 0 collect the timelines that the recipe asks for."""
    span = parts.config.observe.trace_steps if parts.world.is_main else None
    traces = UpdateTraces(span, parts.folder.path, console)
    parts.state.engine.on_report(traces.take)
    return traces


def assemble(
    config: RunConfig,
    world: World,
    began: Callable[[RunFolder, int], Heartbeat] | None = None,
) -> tuple[Parts, Progress, list[str]]:
    """Build everything a run needs; return it with the restored progress and notes for a person."""
    agree(config, world)
    folder = world.on_main(lambda: open_run_folder(config))
    corpus = world.on_main(lambda: checked_corpus(config))
    dtype = compute_dtype_of(config.train, world.device.type)
    hardware = hardware_for(config, world, dtype)
    # The corpus is tokenised and the machine measured with all cores; from here on each rank has
    # its own.
    bind_rank(world.device)
    plan = possible_plan(config, world, corpus, hardware)
    batches = batches_of(config, plan, world, corpus)
    torch.manual_seed(config.run.seed + world.rank)
    objective = objective_of(config)(config, plan, world)
    manifest = manifest_of(config, plan.vocabulary_size)
    model = build_model(config, plan, manifest, world)
    beginning = begin(model, objective, folder, config, corpus)
    engine = builder_of(config).open_engine(model, config, plan, hardware, manifest, world)
    with ExitStack() as undo:
        # Whoever gets the parts closes it; if they cannot be made, nobody does.
        undo.callback(engine.close)
        state = TrainingState(model, engine, objective, world)
        opened = folder
        folder, attempt = world.on_main(lambda: begin_attempt(opened, config))
        heartbeat = began(folder, attempt) if began else Heartbeat()
        heartbeat.enter("load")
        progress, notes = restore(folder, attempt, state, corpus, manifest)
        if world.is_main:
            folder.store.require_live(attempt)
            documents = dict(engine.documents)
            if manifest.entries:
                documents[MANIFEST_NAME] = manifest.document
            notes += describe_start(folder, config, plan, corpus, documents)
        parts = Parts(
            config,
            world,
            folder,
            plan,
            hardware,
            attempt,
            corpus.digest,
            batches,
            manifest,
            model,
            objective,
            state,
            diagnostics_of(config, state),
            heartbeat,
        )
        expected = (
            [f"the plan expects trouble: {plan.offload.problem}"] if plan.offload.problem else []
        )
        told = [*folder.notes, *beginning, *engine.notes, *notes, *expected]
        said = [f"run folder {folder.path}", *told]
        undo.pop_all()
    return parts, progress, said


def batches_of(config: RunConfig, plan: Plan, world: World, corpus: PreparedCorpus) -> StepBatches:
    """Return what cuts a corpus into this rank's micro-batches."""
    return StepBatches(
        training=TrainingRows(corpus, config),
        validation=ValidationRows(corpus, config),
        plan=plan,
        world=world,
        end_of_text=corpus.index.end_of_text,
        respect_documents=config.data.respect_documents,
        validation_bytes_per_token=corpus.bytes_per_token("validation"),
    )


def possible_plan(
    config: RunConfig, world: World, corpus: PreparedCorpus, hardware: HardwareProfile
) -> Plan:
    """Return what will happen.

    Raises:
        ConfigError: It cannot: memory, or an attention that this device has not.
    """
    setting = Setting(
        world_size=world.size,
        device_type=world.device.type,
        vocabulary_size=corpus.index.vocabulary_size,
        corpus_tokens=corpus.tokens("train"),
        hardware=hardware,
        ranks_per_host=local_ranks(),
    )
    plan = resolve(config, setting)
    if plan.offload.impossible:
        raise ConfigError(plan.offload.impossible)
    world.on_main(lambda: require_host_memory(config, plan))
    check_attention(config, world.device, plan.microbatch_rows)
    return plan


def describe_start(
    folder: RunFolder,
    config: RunConfig,
    plan: Plan,
    corpus: PreparedCorpus,
    documents: Mapping[str, Mapping[str, object]],
) -> list[str]:
    """Write what a run folder tells of itself before the first step; return notes for a person on
    what has changed since the start before.
    """
    notes = keep_plugins(folder.path, config.model.plugins)
    file = config.parallel.deepspeed_config
    own_settings = digest_of(Path(file).expanduser()) if file else ""
    environment = describe_environment(plan, own_settings)
    if folder.resumes:
        notes.append(contract_note(read_environment(folder.path), environment))
    describe(folder.path, config, plan, corpus, environment)
    for name, document in documents.items():
        write_json(folder.path / name, document)
    return notes


def hardware_for(config: RunConfig, world: World, dtype: torch.dtype) -> HardwareProfile:
    """Return the machine as this rank sees it; copy and update rates, which take seconds to measure
    the first time, only where the recipe offloads.
    """
    hardware = quick_profile(world.device, dtype)
    if config.offload.strategy == "none":
        return hardware
    known = world.on_main(lambda: known_profile(world.device, print))
    known = with_active_ranks(known, local_ranks())
    return hardware.model_copy(update={"rates": known.rates, "name": known.name})


@cache
def quick_profile(device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    """Return what a look at a device tells; a process with many short runs looks once."""
    return profile_hardware(device, dtype)


def checked_corpus(config: RunConfig) -> PreparedCorpus:
    """Return the prepared corpus of a recipe after checking every digest."""
    corpus = prepare(config.data, announce=lambda text: print(text, flush=True))
    corpus.verify()
    return corpus


def build_model(config: RunConfig, plan: Plan, manifest: Manifest, world: World) -> Model:
    """Build the model without memory, spread it over the ranks, then fill each rank's part."""
    dtype = compute_dtype_of(config.train, world.device.type)
    with torch.device("meta"):
        model = objective_of(config).build(config, plan.vocabulary_size, dtype)
        parametrise(model, manifest)
        # Weights have the dtype they are computed with; the optimizer keeps their fp32 masters.
        cast_weights(model, dtype)
    units = model.units
    recompute_layers(units, config.train.activation_checkpointing)
    if compiles(config, world.device.type):
        compile_layers(units)
    builder_of(config).spread(model, config, world, dtype)
    model.initialise(config.run.seed, manifest.rescale)
    return model


def begin(
    model: Model,
    objective: Objective,
    folder: RunFolder,
    config: RunConfig,
    corpus: PreparedCorpus,
) -> list[str]:
    """Freeze what the objective does not train and let a new run start from saved weights; return
    notes for a person.
    """
    if isinstance(objective, Freezes):
        objective.freeze(model)
    if folder.resumes:
        return []
    tokenizer = load_tokenizer(corpus.folder / TOKENIZER_NAME, config.data.end_of_text)
    note = start_from(model, config, tokenizer)
    return [note] if note else []


def restore(
    folder: RunFolder,
    attempt: int,
    state: TrainingState,
    corpus: PreparedCorpus,
    manifest: Manifest,
) -> tuple[Progress, list[str]]:
    """Continue from the newest intact checkpoint, if the run has one.

    Raises:
        CheckpointError: None is intact, or corpus or manifest are not those the run was started
            with.
    """
    if not folder.resumes:
        return Progress(), []
    restored = load_newest(folder.store, state)
    saved = restored.scalars
    if saved.corpus_digest != corpus.digest:
        raise CheckpointError(
            f"the corpus in {corpus.folder} is not the one this run was started with, so its "
            "rows would be "
            "others; restore the text as it was, or start a new run"
        )
    if changed := differences(saved.manifest, manifest.document):
        raise CheckpointError(
            "muP scales this model otherwise than the one of the checkpoint, whose weights were "
            f"trained for the old scale: {'; '.join(changed)}; restore the settings under [mup] "
            "and [model], or start a new run"
        )
    # A broken newer step stands in the way of saving that step again.
    if state.world.is_main:
        for step in restored.broken_steps:
            folder.store.set_aside(step, attempt)
    state.world.barrier()
    resumed = f"resumed from the checkpoint of step {saved.progress.step}"
    return saved.progress, [*restored.messages, resumed]


def describe(
    run_dir: Path,
    config: RunConfig,
    plan: Plan,
    corpus: PreparedCorpus,
    environment: Mapping[str, object],
) -> None:
    """Write what a run folder tells of itself before the first step."""
    write_atomically(run_dir / "config.toml", config_text(config))
    write_json(run_dir / "plan.json", plan.model_dump(mode="json"))
    write_json(run_dir / ENVIRONMENT_NAME, environment)
    shutil.copyfile(corpus.folder / TOKENIZER_NAME, run_dir / TOKENIZER_NAME)


def leave_pictures(folder: RunFolder, attempt: int) -> None:
    """Draw pictures, unless a newer start has taken over, if disk and memory have room for them:
    how the run ended must not be hidden.
    """
    try:
        if folder.store.live_attempt() == attempt:
            draw_pictures(folder.path)
    # ImportError: a library that does not fit into memory any more.
    except (OSError, MemoryError, ImportError) as error:
        print(f"no pictures of this run: {error}")


def draw_pictures(run_dir: Path) -> None:
    """Write `loss.png` and `report.html` from what the folder holds."""
    write_loss_curve(read_metrics(run_dir / METRICS_NAME), run_dir / "loss.png")
    write_report(run_dir)


def conclude(run: Run) -> None:
    """Say how the run ended and what to look at; write samples if it is finished."""
    path, step, steps = run.folder.path, run.progress.step, run.plan.steps
    if step < steps:
        print(
            f"stopped after step {step} of {steps}; the state is saved. Resume with\n"
            f"    interlace train --resume {path}"
        )
        return
    if run.parts.config.observe.sample_tokens and not run.stop.received:
        write_samples(path, run.parts.config)
        write_report(path)
    print(f"\nfinished {steps} steps")
    print(f"  run folder  {path}")
    print(f"  curve       {path / 'loss.png'}")
    if (path / "samples.txt").is_file():
        print(f"  sample      {path / 'samples.txt'}")
    if (path / PICTURE_NAME).is_file():
        print(f"  updates     {path / PICTURE_NAME}, and {TRACE_NAME} for ui.perfetto.dev")
    print(f"  report      {path / 'report.html'}")
    print(f"  more text   interlace sample {path} --prompt 'def '")


def write_samples(run_dir: Path, config: RunConfig) -> None:
    """Continue every prompt of the recipe; print the texts and write `samples.txt`."""
    saved = load_saved_model(run_dir)
    settings = SamplingSettings(
        max_tokens=config.observe.sample_tokens,
        temperature=config.observe.sample_temperature,
        seed=config.run.seed,
    )
    texts = [
        prompt + "".join(saved.continuation(prompt, settings))
        for prompt in config.observe.sample_prompts
    ]
    page = "\n\n".join(f"--- sample {n} ---\n{text}" for n, text in enumerate(texts, start=1))
    write_atomically(run_dir / "samples.txt", page + "\n")
    print(f"\n{page}")
