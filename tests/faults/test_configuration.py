"""Recipes that are wrong, versions that changed, and ranks that do not belong together."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import stored_run
import tomli_w
from ranks import run_on_ranks
from tiny_run import config_of, sign, state_of, train_here

from interlace.launch import cli
from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.checkpoint.manifest import FORMAT_VERSION
from interlace.trainer.checkpoint.state import load_newest
from interlace.trainer.config import load_recipe
from interlace.trainer.config.problems import SYNONYMS, sections
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.contract import changes, contract_note
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.loop import finished_steps, train
from interlace.trainer.observe.environment import describe_environment
from interlace.trainer.world import World

WRONG_FOR_ALL = ({"a": {"b": 1}}, date(1979, 5, 27), [["a"]])
NEITHER_TEXT_NOR_NUMBER = (True, [], {"_target_": "os.system"})


def kinds_of(annotation: object) -> set[object]:
    """Return the plain types that a setting may have, without None."""
    if get_origin(annotation) is Literal:
        return {Literal}
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return kinds_of(parts[0])
    if get_origin(annotation) in (list, dict):
        return {get_origin(annotation)}
    return set().union(*map(kinds_of, parts)) if parts else {annotation} - {type(None)}


def wrong_values(kinds: set[object]) -> Iterator[object]:
    """Yield values that a setting of these types must refuse."""
    if dict not in kinds:
        yield from WRONG_FOR_ALL
    if kinds & {int, float}:
        yield from ("1e-4", "many", "", float("nan"), float("inf"), -1, -1e-9)
        yield from NEITHER_TEXT_NOR_NUMBER
    if kinds == {int}:
        yield from (1.5, 1e3, 10**30)
    if kinds == {bool}:
        yield from (1, 0, "true", "yes", "", 1.0)
    if kinds & {str, Literal} and list not in kinds:
        yield from (5, 0.5, True, [], ["a"])
    if kinds == {Literal}:
        yield from ("", "no-such-choice", "NONE")
    if list in kinds:
        yield from (5, True, [True])


def wrong_recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield recipes with one mistake each, and what the mistake is."""
    choice = random.Random(0)
    for section, kind in sections().items():
        yield f"{section} is no table", {section: choice.choice([5, "text", True, [1]])}
        for key, field in kind.model_fields.items():
            for value in wrong_values(kinds_of(field.annotation)):
                yield f"{section}.{key} = {value!r}", {section: {key: value}}
            letters = list(key)
            place = choice.randrange(len(letters))
            letters[place] = choice.choice("xyz_".replace(letters[place], ""))
            misspelt = "".join(letters)
            yield f"{section}.{misspelt} is unknown", {section: {misspelt: 1}}
        for foreign in SYNONYMS.keys() - kind.model_fields.keys():
            yield f"{section}.{foreign} is unknown", {section: {foreign: 1}}
    for name in ("modle", "Model", "", "model ", "model.width", "_target_", "defaults", "hydra"):
        yield f"section {name!r} is unknown", {name: {"width": 64}}
        yield f"setting {name!r} is unknown", {"train": {name: 64}}


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing open a process group."""

    def refuse() -> None:
        raise AssertionError("a process group was opened")

    monkeypatch.setattr("interlace.trainer.world.process_group", refuse)


def test_h1_every_wrong_recipe_is_refused_before_a_process_group_or_a_file(
    no_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    recipe = tmp_path / "recipe.toml"
    recipes = list(wrong_recipes())
    for what, tables in recipes:
        recipe.write_text(tomli_w.dumps(tables), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_recipe(str(recipe))
            pytest.fail(f"{what} is taken")
        (section, values), *_ = tables.items()
        key = f"{section}.{next(iter(values))}" if isinstance(values, dict) else section
        assert key in str(caught.value) or section in str(caught.value), what
    assert len(recipes) > 2000
    # The command as a whole, of which the above is the slow part.
    for what, tables in random.Random(1).sample(recipes, 30):
        recipe.write_text(tomli_w.dumps(tables), encoding="utf-8")
        assert cli.main(["train", str(recipe)]) == 2, what
        said = capsys.readouterr().err
        assert said.startswith("interlace: ")
        assert "Traceback" not in said
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "model.width=30 model.heads=4",
        "model.heads=6 model.kv_heads=4 model.width=96",
        "train.tokens_per_step=100 data.sequence_length=256",
        "offload.stride=2 offload.strategy=none",
        "data.end_of_text=<eos> data.tokenizer=bytes",
        "observe.trace_steps=5:5",
        "data.source=[]",
    ],
)
def test_h1_settings_that_contradict_each_other_are_refused_before_anything(
    words: str, no_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "quickstart", *words.split()]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("parallel.replicas=3", r"parallel\.replicas=3: does not divide the 1 ranks"),
        ("train.tokens_per_step=96", r"do not split evenly over 2 ranks"),
    ],
)
def test_h1_a_recipe_that_contradicts_the_number_of_ranks_is_refused_before_a_file(
    words: str, problem: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    folder = tmp_path / "prepared"
    config = config_of(tiny, tmp_path / "run", f"data.prepared_dir={folder}", words)
    size = 2 if "2 ranks" in problem else 1
    with pytest.raises(ConfigError, match=problem):
        train(config, World(size=size))
    assert list(tmp_path.iterdir()) == []


def test_h1_keys_that_appear_twice_are_refused(tmp_path: Path, no_ranks: None) -> None:
    recipe = tmp_path / "recipe.toml"
    for text in (
        "[train]\nsteps = 1\nsteps = 2\n",
        "[train]\nsteps = 1\n[train]\ntokens_per_step = 4096\n",
        "train.steps = 1\n[train]\nsteps = 2\n",
        '[train]\nsteps = 1\n"steps" = 2\n',
    ):
        recipe.write_text(text, encoding="utf-8")
        assert cli.main(["train", str(recipe)]) == 2, text


@pytest.fixture(scope="module")
def saved(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run with a checkpoint of step 5."""
    run = tmp_path_factory.mktemp("saved") / "run"
    train_here(tiny, run, "train.steps=5")
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_h2_a_checkpoint_of_a_newer_format_is_refused(run: Path, tiny: Sequence[str]) -> None:
    manifest = run / "checkpoints" / "committed" / "00000005" / "MANIFEST.json"
    document = json.loads(manifest.read_bytes())
    assert document["format_version"] == FORMAT_VERSION
    sign(manifest, {**document, "format_version": FORMAT_VERSION + 1})
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}, but this"):
        train_here(tiny, run, "train.steps=6")


def test_h2_a_checkpoint_of_another_shape_is_refused(
    run: Path, tiny: Sequence[str], tmp_path: Path
) -> None:
    """Even where nobody compares recipes first."""
    live = state_of(tiny, tmp_path / "other", "model.ffn_width=96")
    with pytest.raises(CheckpointError, match=r"the checkpoint holds F32 .*, the model needs F32"):
        load_newest(CheckpointStore(run / "checkpoints"), live)


def test_h2_the_same_machine_resumes_bit_for_bit_and_says_so(
    tiny: Sequence[str], tmp_path: Path, losses_of: Callable[[Path], list[str]]
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert "determinism" not in train_here(tiny, straight, "train.steps=8")
    with open_run(config_of(tiny, run, "train.steps=8"), World()) as stopped:
        assert next(step for step in finished_steps(stopped) if step == 4)
        stopped.conclude()
    said = train_here(tiny, run, "train.steps=8")
    assert "resumed from the checkpoint of step 5" in said
    assert "determinism D0: losses are those of an undisturbed run, bit for bit" in said
    assert losses_of(run) == losses_of(straight)


@pytest.mark.parametrize(
    ("key", "was", "level"),
    [
        ("libraries.torch", "2.11.0", "D2: torch is now"),
        ("sources", "0123456789ab", "D2: sources is now"),
        ("processor", "Zilog Z80", "D2: processor is now"),
        ("torch_threads", 77, "D1: torch_threads is now"),
        ("world_size", 4, "D1: world_size is now 1, was 4"),
        ("engine", "DeepSpeed 0.19.8, ZeRO stage 3, our update", "D1: engine is now fsdp2, was De"),
    ],
)
def test_h2_what_changed_since_the_last_start_lowers_the_contract(
    key: str, was: object, level: str, run: Path, tiny: Sequence[str]
) -> None:
    path = run / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    table, _, leaf = key.rpartition(".")
    (environment[table] if table else environment)[leaf] = was
    path.write_text(json.dumps(environment), encoding="utf-8")
    said = train_here(tiny, run, "train.steps=6")
    assert f"determinism lowered to {level}" in said
    assert f"was {was}" in said
    again = train_here(tiny, run, "train.steps=7")
    assert "determinism D0" in again


def test_h2_other_settings_of_deepspeed_are_another_engine(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    with open_run(config_of(tiny, tmp_path / "run"), World()) as run:
        zero = run.plan.model_copy(update={"engine": "deepspeed", "zero_stage": 3})
        plain = describe_environment(run.plan)["engine"]
    assert plain == "fsdp2"
    words = [describe_environment(zero, own)["engine"] for own in ("", "0123", "4567")]
    assert str(words[0]).endswith("ZeRO stage 3, torch's update")
    assert words[1:] == [f"{words[0]}, own settings 0123", f"{words[0]}, own settings 4567"]


def test_h2_an_environment_that_cannot_be_read_is_told() -> None:
    now = {"world_size": 2}
    assert contract_note(None, now).startswith("determinism unknown")
    assert contract_note({}, now).startswith("determinism D0")
    assert "engine is now DeepSpeed, was fsdp2" in contract_note({}, {"engine": "DeepSpeed"})
    both = contract_note({"world_size": 1, "cuda": "12.8"}, {**now, "cuda": "13.0"})
    assert "lowered to D2: world_size is now 2, was 1, cuda is now 13.0, was 12.8" in both


DISAGREE = """
import os, sys
from interlace.trainer import rendezvous
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.loop import finished_steps, train
from interlace.trainer.world import process_group

def begin(world, *words):
    words = ["run.dir=run", "data.prepared_dir=prepared", *words]
    config = load_recipe("fault-drill", words).config
    try:
        train(config, world)
    except ConfigError as error:
        # One write, so that lines of two ranks do not run into each other.
        sys.stdout.write(f"RANK {world.rank} {error}\\n")
    world.barrier()

with process_group() as world:
    other = world.rank == 1
    begin(world, f"optimizer.peak_lr={0.5 if other else 0.25}")
    digest = rendezvous.source_digest
    rendezvous.source_digest = (lambda: "f" * 64) if other else digest
    begin(world)
"""


def test_h5_ranks_with_another_recipe_or_another_program_are_refused(tmp_path: Path) -> None:
    done = run_on_ranks(DISAGREE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = (
        "optimizer.peak_lr is not the same on all ranks: 0.25 on rank 0, 0.5 on rank 1; "
        "start all with one recipe"
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RANK")]
    for rank in (0, 1):
        assert len(lines) == 4, done.stdout + done.stderr
        first, second = (line for line in lines if line.startswith(f"RANK {rank} "))
        assert first == f"RANK {rank} {recipe}"
        assert second.startswith(f"RANK {rank} the sources of interlace are not the same on all ")
        assert second.endswith(" on rank 0, ffffffffffff on rank 1; install one version everywhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py"]


def test_the_types_of_all_settings_are_known_to_the_mistakes() -> None:
    """A setting of a type that no mistake is made for would be passed over in silence."""
    known = {int, float, str, bool, Literal, list, dict}
    strange = {
        f"{section}.{key}": field.annotation
        for section, kind in sections().items()
        for key, field in kind.model_fields.items()
        if not kinds_of(field.annotation) <= known
    }
    assert strange == {}
    assert len(RunConfig.model_fields) > 10


STORED = sorted((Path(__file__).parent / "stored").iterdir())


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.name)
def test_h3_a_run_that_earlier_code_saved_goes_on_as_it_went_on_then(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State to the bit everywhere; losses to the bit where program libraries and processor are
    those of then, else within the tolerance of the contract.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(stored_run.TEXT, encoding="utf-8")
    run = Path(shutil.copytree(stored, tmp_path / "run"))
    after = json.loads((run / "after.json").read_text(encoding="utf-8"))
    assert stored_run.loaded_digest(run) == after["digest"]
    before = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    said = train_here(stored_run.WORDS, run)
    assert "resumed from the checkpoint of step 4" in said
    now = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    expected = [float.fromhex(loss) for loss in after["losses"]]
    found = stored_run.losses_after(run)
    # The sources are other ones on purpose.
    changed = {key for key, _ in changes(before, now)} - {"sources"}
    assert found == (expected if not changed else pytest.approx(expected, abs=1e-5))


def test_h3_the_format_of_now_is_stored() -> None:
    assert f"format-{FORMAT_VERSION}" in [path.name for path in STORED]
