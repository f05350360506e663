"""What each command does, in terms of the trainer. Heavy imports stay inside the commands that
need them.
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from interlace.trainer.config import list_recipes, load_recipe
from interlace.trainer.config.load import Recipe
from interlace.trainer.config.problems import all_settings, near_miss, show
from interlace.trainer.errors import ConfigError

if TYPE_CHECKING:
    from interlace.offload.hardware import HardwareProfile


def recipes(arguments: Namespace) -> int:
    """List the shipped recipes."""
    listed = list_recipes()
    if arguments.json:
        print(json.dumps(listed, indent=2))
        return 0
    width = max(len(name) for name in listed)
    for name, description in listed.items():
        print(f"{name:<{width}}  {description}")
    return 0


def train(arguments: Namespace) -> int:
    """Train, continue a run, or branch one."""
    from interlace.launch.branch import branch_recipe

    branches = arguments.from_step is not None
    recipe = branch_recipe(arguments) if branches else recipe_to_train(arguments)
    from interlace.trainer.loop import train as run_training
    from interlace.trainer.world import process_group

    with process_group() as world:
        run_training(recipe.config, world)
    return 0


def launch(arguments: Namespace) -> int:
    """Start a run on several processes, machines, or a cluster."""
    recipe = recipe_to_train(arguments)
    if arguments.launcher == "torchrun":
        from interlace.launch.launchers.torchrun import launch_torchrun

        return launch_torchrun(arguments, recipe)
    if arguments.launcher == "ray":
        from interlace.launch.launchers.ray.command import launch_ray

        return launch_ray(arguments, recipe)
    from interlace.launch.launchers.jobs import launch_job

    return launch_job(arguments, recipe)


def recipe_to_train(arguments: Namespace) -> Recipe:
    """Return the recipe that `train` was given, or the one of the run to resume."""
    overrides = list(arguments.overrides)
    if arguments.resume is None:
        if arguments.recipe is None:
            known = ", ".join(list_recipes())
            command = arguments.command
            raise ConfigError(
                [f"{command} needs a recipe ({known}, or a TOML file) or --resume RUN"]
            )
        return load_recipe(arguments.recipe, overrides)
    if arguments.recipe is not None:
        if "=" not in arguments.recipe:
            raise ConfigError(
                [
                    f"--resume {arguments.resume}: the run knows its recipe; leave "
                    f"{arguments.recipe} out"
                ]
            )
        overrides.insert(0, arguments.recipe)
    saved = Path(arguments.resume) / "config.toml"
    if not saved.is_file():
        raise ConfigError(
            [
                f"--resume {arguments.resume}: is not a run folder (there is no {saved}); runs "
                "lie under runs/"
            ]
        )
    return load_recipe(str(saved), [*overrides, f"run.dir={Path(arguments.resume).absolute()}"])


def plan(arguments: Namespace) -> int:
    """Show what a recipe would do."""
    from interlace.launch.offload_table import draw_plan, parse_sweep, scaling_lines
    from interlace.launch.output_files import picture_file
    from interlace.launch.plan_table import (
        check_engine,
        check_rates,
        make_setting,
        plan_table,
        ranks_to_plan_for,
        this_machine,
    )
    from interlace.trainer.plan import on_ranks, resolve
    from interlace.trainer.scaling import sweep

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    counts = parse_sweep(arguments.sweep) if arguments.sweep else []
    picture = picture_file("--timeline", arguments.timeline) if arguments.timeline else None
    ranks = ranks_to_plan_for(recipe.config, arguments.ranks, counts)
    machine = profile_of("hardware", arguments.hardware) if arguments.hardware else this_machine()
    check_rates({"sweep": arguments.sweep, "timeline": arguments.timeline}, machine)
    alone = make_setting(recipe.config, 1, machine)
    setting = on_ranks(alone, ranks)
    resolved = resolve(recipe.config, setting)
    check_engine(recipe.config, resolved)
    rows = sweep(recipe.config, alone, counts)
    if picture:
        draw_plan(recipe.config, setting, picture)
    if arguments.json:
        document = resolved.model_dump(mode="json")
        print(json.dumps(document | {"scaling": [asdict(row) for row in rows]}, indent=2))
        return 0
    print(plan_table(recipe, resolved))
    if rows:
        print("\n".join(scaling_lines(rows)))
    if picture:
        print(f"\ntimelines  {picture}")
    return 0


def profile_of(option: str, name: str) -> "HardwareProfile":
    """Return the profile that an option names.

    Raises:
        ConfigError: There is no such machine or file, or the file is not a profile.
    """
    from interlace.offload.hardware import load_profile

    try:
        return load_profile(name)
    except ValueError as error:
        raise ConfigError([f"--{error}".replace("hardware", option, 1)]) from error


def profile(arguments: Namespace) -> int:
    """Measure this machine for the performance model."""
    from interlace.launch.output_files import output_file
    from interlace.launch.profile_table import profile_table
    from interlace.offload.hardware import known_machines
    from interlace.offload.measure import keep

    output = output_file("--output", arguments.output) if arguments.output else None
    shown = profile_of("show", arguments.show) if arguments.show is not None else measured_now()
    if output:
        keep(shown, output)
        print(f"wrote {output}", file=sys.stderr)
    if arguments.json:
        print(shown.model_dump_json(indent=2))
        return 0
    print(profile_table(shown))
    print(f"\nknown machines for --hardware and --show: {', '.join(known_machines())}")
    return 0


def measured_now() -> "HardwareProfile":
    """Measure this machine and put the profile on record."""
    import torch

    from interlace.offload.measure import cache_path, keep, measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    measured = measure(device, lambda text: print(f"... {text}", file=sys.stderr, flush=True))
    path = cache_path(device)
    try:
        keep(measured, path)
        print(f"wrote {path}", file=sys.stderr)
    except OSError as error:
        print(f"not on record: {path} cannot be written ({error.strerror})", file=sys.stderr)
    print(f"took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return measured


def bench(arguments: Namespace) -> int:
    """Measure models side by side; the one benchmark there is: long contexts."""
    # Torch's profiler would write a line at every start and stop; it asks when torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from interlace.launch.longctx.command import longctx

    return longctx(arguments, progress_line("rounds"))


def mup(arguments: Namespace) -> int:
    """Show what muP makes of a recipe, or check that it holds."""
    if arguments.view == "check":
        from interlace.launch.mup.check_command import check

        return check(arguments, progress_line("trials"))
    from interlace.launch.mup.table import table

    return table(arguments)


def sweep(arguments: Namespace) -> int:
    """Find the best learning rate at several widths, and whether it transfers."""
    from interlace.launch.sweep.command import sweep as run_sweep

    return run_sweep(arguments)


def doctor(arguments: Namespace) -> int:
    """Tell what this machine has, and which attention a recipe takes on it."""
    recipe = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe else None
    from interlace.launch.doctor_host import cores_here, warnings_here
    from interlace.launch.doctor_page import attention_of, doctor_page, machine

    found, cores, warnings = machine(), cores_here(), warnings_here(Path())
    attention = None if recipe is None else attention_of(recipe.config)
    if arguments.json:
        told = {"machine": asdict(found), "cores": asdict(cores), "warnings": warnings}
        print(json.dumps(told | {"attention": attention}, indent=2))
        return 0
    print(doctor_page(found, cores, warnings, recipe, attention))
    return 0


def conform(arguments: Namespace) -> int:
    """Hold mixers to what they declare; status 2 if a promise is broken."""
    from interlace.launch.conform_page import (
        as_documents,
        conform_page,
        letters_to_try,
        reports_on,
        settings_to_try,
    )

    name, overrides = arguments.name, list(arguments.overrides)
    if name is not None and "=" in name:
        name, overrides = None, [name, *overrides]
    settings = settings_to_try(arguments.plugin, arguments.recipe, overrides)
    reports = reports_on(letters_to_try(name, arguments.all), settings)
    if arguments.json:
        print(json.dumps(as_documents(reports), indent=2))
    else:
        print(conform_page(reports, settings))
    return 2 if any(report.failures for report in reports) else 0


def why(arguments: Namespace) -> int:
    """Tell where a value comes from: every layer that set it, the last one wins."""
    settings = all_settings()
    if arguments.setting not in settings:
        hint = near_miss(arguments.setting, settings)
        raise ConfigError([f"{arguments.setting}: there is no such setting{hint}"])
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    section, _, key = arguments.setting.partition(".")
    value = getattr(getattr(recipe.config, section), key)
    origins = recipe.origins.get(arguments.setting, ())
    default = type(getattr(recipe.config, section)).model_fields[key].default
    history = [("default", default), *((origin.where, origin.value) for origin in origins)]
    if arguments.setting == "run.name" and not origins:
        history.append(("the recipe's file name", value))
    if arguments.json:
        steps = [{"where": where, "value": given} for where, given in history]
        print(
            json.dumps(
                {"setting": arguments.setting, "value": value, "history": steps}, default=str
            )
        )
        return 0
    print(f"{arguments.setting} = {show(value)}    {settings[arguments.setting]}")
    for number, (where, given) in enumerate(history, start=1):
        mark = "  <- in force" if number == len(history) else ""
        print(f"  {number}. {where}: {show(given)}{mark}")
    return 0


def prepare(arguments: Namespace) -> int:
    """Tokenise a recipe's text."""
    from interlace.trainer.data.prepare import find_prepared
    from interlace.trainer.data.prepare import prepare as prepare_corpus

    data = load_recipe(arguments.recipe, arguments.overrides).config.data
    already = find_prepared(data)
    corpus = already or prepare_corpus(data, announce=print)
    corpus.verify()
    if already is not None:
        print(f"already prepared, all digests correct: {corpus.tokens('train'):,} training tokens")
    print(f"corpus folder {corpus.folder}")
    return 0


def sample(arguments: Namespace) -> int:
    """Stream a continuation of a prompt to the terminal."""
    problems = [
        f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be {low} or more"
        for name, low in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0))
        if getattr(arguments, name) < low
    ]
    if problems:
        raise ConfigError(problems)
    from interlace.trainer.sampling import SamplingSettings
    from interlace.trainer.saved_model import load_saved_model

    saved = load_saved_model(Path(arguments.run))
    settings = SamplingSettings(
        max_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    sys.stdout.write(arguments.prompt)
    for piece in saved.continuation(arguments.prompt, settings):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def think(arguments: Namespace) -> int:
    """Measure what an energy-based model gains by more steps and more descents."""
    given = (name for name in ("steps", "samples", "rows") if getattr(arguments, name) is not None)
    problems = [
        f"--{name} {getattr(arguments, name)}: must be 1 or more"
        for name in given
        if getattr(arguments, name) < 1
    ]
    if problems:
        raise ConfigError(problems)
    from interlace.launch.output_files import picture_file
    from interlace.launch.thinking_table import thinking_table
    from interlace.trainer.observe.thinking_plot import write_thinking
    from interlace.trainer.saved_model import load_saved_model
    from interlace.trainer.thinking import Thinking, steps_in_training
    from interlace.trainer.thinking import think as measure

    target = arguments.picture or str(Path(arguments.run) / "thinking.png")
    saved = load_saved_model(Path(arguments.run))
    steps = arguments.steps or 2 * steps_in_training(saved.config)
    picture = picture_file("--picture", target)
    settings = Thinking(
        steps=steps, samples=arguments.samples, rows=arguments.rows, seed=arguments.seed
    )
    thought = measure(saved, settings, progress_line("rows"))
    write_thinking(thought, picture)
    if arguments.json:
        print(json.dumps(asdict(thought), indent=2))
        return 0
    print(thinking_table(thought))
    print(f"\npicture  {picture}")
    return 0


def progress_line(what: str) -> Callable[[int, int], None]:
    """Return a function that shows how much is done, on one line of a terminal's error stream."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            ending = "\n" if done == total else ""
            print(f"\r{what} {done} of {total}", end=ending, file=sys.stderr, flush=True)

    return show


def verify(arguments: Namespace) -> int:
    """Check every digest of a run's checkpoints; status 2 if something is broken."""
    from interlace.trainer.checkpoint.verify import verify_run
    from interlace.trainer.observe.units import human_bytes
    from interlace.trainer.run_folder import read_config

    run = Path(arguments.run)
    read_config(run)
    reports = verify_run(run / "checkpoints")
    if arguments.json:
        print(json.dumps([{"step": r.step, "problems": r.problems} for r in reports], indent=2))
    else:
        for report in reports:
            verdict = "ok" if not report.problems else "BROKEN"
            print(f"step {report.step:>8}   {human_bytes(report.bytes):>9}   {verdict}")
            for problem in report.problems:
                print(f"    {problem}")
        if not reports:
            print(f"no committed checkpoint in {run}")
    return 2 if any(report.problems for report in reports) else 0


def export(arguments: Namespace) -> int:
    """Write a model for other programs."""
    form, folder = arguments.to
    if form != "hf":
        raise ConfigError([f"--to {form}: is no known format; the one there is: hf (transformers)"])
    from interlace.trainer.interop.writing import export_hf
    from interlace.trainer.saved_model import load_saved_model

    architecture = export_hf(
        load_saved_model(Path(arguments.run)), Path(arguments.run), Path(folder)
    )
    print(f"wrote {architecture} to {folder}; load it with")
    if (Path(folder) / "energy_transformer.py").is_file():
        print(f"    energy_transformer.EnergyTransformer({folder!r})    (the module lies there)")
    else:
        print(f"    transformers.AutoModelForCausalLM.from_pretrained({folder!r})")
    return 0


def import_model(arguments: Namespace) -> int:
    """Turn a folder that transformers wrote into a model folder."""
    from interlace.trainer.model_folder import claim_new_folder, write_model_folder
    from interlace.trainer.saved_model import load_saved_model

    source, target = Path(arguments.source), Path(arguments.target)
    saved = load_saved_model(source)
    claim_new_folder(str(target), target)
    write_model_folder(
        saved.model.state_dict(),
        saved.config,
        saved.tokenizer,
        target,
        description=f"{source.name}, imported; training goes on from its weights",
    )
    print(f"wrote {target}: recipe.toml, model.safetensors, tokenizer.json. Try")
    print(f"    interlace sample {target}")
    print(f"    interlace train {target}/recipe.toml data.source=YOUR-TEXT")
    return 0


def hybridize(arguments: Namespace) -> int:
    """Write a student of a trained model, with Mamba-2 in place of most of its attention."""
    from interlace.trainer.hybridize import hybridize as make_hybrid
    from interlace.trainer.hybridize import student_recipe
    from interlace.trainer.model_folder import claim_new_folder, write_model_folder
    from interlace.trainer.models.language_model import LanguageModel
    from interlace.trainer.saved_model import load_saved_model, without_multipliers

    source, every = Path(arguments.source), attention_to_keep(arguments.keep_attention)
    target = Path(arguments.to or f"{source.absolute()}-hybrid")
    saved = without_multipliers(load_saved_model(source))
    config, teacher = saved.config, saved.model
    if not isinstance(teacher, LanguageModel):
        raise ConfigError(
            [
                f"{source}: its train.objective={config.train.objective} has no student that "
                "distills it; only language models are hybridized"
            ]
        )
    hybrid = make_hybrid(
        teacher,
        every=every,
        start=arguments.init,
        seed=config.run.seed,
        row_length=config.data.sequence_length,
    )
    claim_new_folder(f"--to {target}", target)
    recipe = student_recipe(config, hybrid, source, target.name)
    said = f"{source.name}, with Mamba-2 in {len(hybrid.replaced)} layers ({arguments.init})"
    write_model_folder(hybrid.weights, recipe, saved.tokenizer, target, description=said)
    kept = ", ".join(str(number + 1) for number in hybrid.kept) or "none"
    print(f"wrote {target}: {hybrid.model.pattern}")
    print(f"Mamba-2 in {len(hybrid.replaced)} layers; attention stays in layers: {kept}. Train it:")
    print(f"    interlace train {target}/recipe.toml")
    return 0


def attention_to_keep(text: str) -> int:
    """Return N of `every=N`.

    Raises:
        ConfigError: It is not spelled like this.
    """
    word, _, number = text.partition("=")
    if word != "every" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            [f"--keep-attention {text}: cannot be read; type every=4 to keep one layer in four"]
        )
    return int(number)
