"""Sweeps keep what they have found: trials are trained once, whatever happens to a sweep."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import a_trial, pretended, result_of, space_of, without_seconds, words

from interlace.launch.cli import main
from interlace.launch.sweep.carry import axes_between, carried_tables, overrides_of
from interlace.launch.sweep.conducting import State
from interlace.launch.sweep.judging import judged, winner
from interlace.launch.sweep.page import sweep_page
from interlace.launch.sweep.picture import draw
from interlace.launch.sweep.progress import Progress, estimate, seconds_left, summary, table
from interlace.launch.sweep.records import csv_text, sweep_document, write_records
from interlace.launch.sweep.running import clipping, divergence, late_mean, run_trial
from interlace.launch.sweep.store import Store
from interlace.launch.sweep.trials import Space
from interlace.trainer.config.load import load_recipe
from interlace.trainer.errors import ConfigError, UserError
from interlace.trainer.loop import train
from interlace.trainer.observe.metrics import StepRecord, read_metrics
from interlace.trainer.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


# Trials and their digests


def test_a_trial_gives_what_training_gives(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path)
    trial, store = a_trial(space, log2_lr=-6.0), Store(space.request.store)
    config = space.config_of(trial)
    result = run_trial(store, space.key_of(trial), config.model_dump(mode="json"))
    assert (config.model.width, config.optimizer.peak_lr, config.mup.enabled) == (16, 2**-6, False)

    run = config.run.model_copy(update={"dir": str(tmp_path / "run")})
    outcome = train(config.model_copy(update={"run": run}), World())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert result.loss == outcome.validation_loss
    assert result.curve["loss"] == [record.loss for record in records]
    assert result.curve["val_loss"] == [None, None, None, result.loss]
    assert result.train_loss == records[-1].loss and result.steps == 4 and not result.diverged
    assert store.read(result.key) == result
    left = sorted(path.name for path in store.folder_of(result.key).iterdir())
    assert left == ["result.json"], "the run folder goes"


def test_a_finished_trial_is_read_and_not_run(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path)
    trial, store = a_trial(space), Store(space.request.store)
    recipe = space.config_of(trial).model_dump(mode="json")
    first = run_trial(store, space.key_of(trial), recipe)
    assert run_trial(store, space.key_of(trial), recipe) == first
    assert store.starts() == [first.key] and list(store.results()) == [first]


def test_divergence_is_a_result(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path, "train.steps=40", "optimizer.clip=0.0")
    trial, store = a_trial(space, log2_lr=12.0), Store(space.request.store)
    result = run_trial(store, space.key_of(trial), space.config_of(trial).model_dump(mode="json"))
    assert result.loss == math.inf and result.diverged and result.steps < 40
    kept = json.loads((store.folder_of(result.key) / "result.json").read_text(encoding="utf-8"))
    assert kept["loss"] is None and store.read(result.key) == result


def test_a_trial_that_cannot_run_leaves_no_result(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path)
    trial, store = a_trial(space), Store(space.request.store)
    recipe = space.config_of(trial).model_dump(mode="json")
    recipe["data"]["source"] = str(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"gone\.txt"):
        run_trial(store, "key", recipe)
    assert store.read("key") is None and store.starts() == ["key"]
    assert not list(store.folder_of("key").glob("run.*"))


def test_only_what_counts_changes_a_digest(corpus: tuple[str, str], tmp_path: Path) -> None:
    def key(*more: str, **changes: Any) -> str:
        space = space_of(corpus, tmp_path, *more)
        return space.key_of(a_trial(space, **changes))

    same = {
        key(),
        key("run.name=other"),
        key("run.dir=elsewhere"),
        key("observe.log_every_steps=1", "checkpoint.every_steps=1", "data.workers=1"),
        key("--seeds", "1", "--jobs", "1"),
    }
    other = {
        key(seed=1),
        key(log2_lr=-6.0),
        key(width=32),
        key(parametrisation="mup"),
        key("train.steps=5"),
        key("optimizer.beta2=0.9"),
        key("model.layers=2"),
    }
    assert len(same) == 1 and len(other) == 7 and not same & other


def test_other_code_or_text_asks_for_other_results(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path)
    trial = a_trial(space)
    changed = [
        Space(space.request, space.configs, 16, "other code", "cpu", space.texts),
        Space(space.request, space.configs, 16, space.code, "cuda", space.texts),
        Space(space.request, space.configs, 16, space.code, "cpu", {(): "other text"}),
    ]
    assert len({space.key_of(trial), *(each.key_of(trial) for each in changed)}) == 4


def test_muP_is_told_its_base_width(corpus: tuple[str, str], tmp_path: Path) -> None:
    scaled = {"parametrisation": "mup", "width": 32}

    def base_width(*more: str) -> int | None:
        space = space_of(corpus, tmp_path, *more)
        return space.config_of(a_trial(space, **scaled)).mup.base_width

    assert base_width() == 16, "the narrowest"
    assert base_width("mup.base_width=32") == 32, "the recipe's"
    assert base_width("mup.base_width=32", "--base-width", "64") == 64, "the command's"
    space = space_of(corpus, tmp_path, "mup.base_width=32", "mup.enabled=true")
    plain = space.config_of(a_trial(space)).mup
    assert not plain.enabled and plain.base_width is None


def test_the_control_has_no_rules_that_could_be_left_out(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    on = ("mup.enabled=true", "mup.base_width=16", "mup.without=['hidden_lr']")
    space = space_of(corpus, tmp_path, *on, "--parametrisation", "both")
    scaled, plain = (
        space.config_of(a_trial(space, parametrisation=each)).mup for each in ("mup", "standard")
    )
    assert scaled.without == ["hidden_lr"]
    assert (plain.enabled, plain.without) == (False, [])


def test_a_width_that_cannot_be_is_refused_before_anything_runs(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="at width 17 in place of"):
        space_of(corpus, tmp_path, "--widths", "16,17")


@pytest.mark.parametrize(
    ("losses", "warmup", "lost"),
    [
        ([5.5, 5.0, 6.1], 0, True),
        ([5.5, 5.0, 5.9], 0, False),
        ([5.5, 5.0, 6.1], 3, False),
        ([5.5, math.nan], 9, True),
        ([math.inf], 9, True),
    ],
)
def test_a_loss_far_above_the_first_has_diverged_once_warmed_up(
    losses: list[float], warmup: int, lost: bool
) -> None:
    records = [StepRecord(step=n, tokens=n, loss=loss) for n, loss in enumerate(losses, start=1)]
    assert bool(divergence(records, warmup)) is lost


def test_the_share_of_clipped_coordinates_is_read_from_what_steps_tell() -> None:
    def record(**details: float) -> StepRecord:
        named = {key.replace("__", "/"): value for key, value in details.items()}
        return StepRecord(step=1, tokens=1, details=named)

    assert clipping(record()) is None
    assert clipping(record(clip_fraction=0.2, clip_fraction__head=0.9)) == 0.2
    assert clipping(record(clip_fraction__a=0.2, clip_fraction__b=0.4)) == pytest.approx(0.3)
    assert late_mean([1.0, 2.0, None, 4.0], 0.05) == 4.0


# Carrying out


def test_a_second_sweep_takes_everything_from_the_store(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    space = space_of(corpus, tmp_path, "--parametrisation", "both")
    first, runner = pretended(space)
    again, idle = pretended(space)
    assert len(runner.started) == len(set(runner.started)) == len(first.results)
    assert idle.started == [] and again.results == first.results
    assert csv_text(again) == csv_text(first)


def test_a_larger_sweep_runs_only_what_is_new(corpus: tuple[str, str], tmp_path: Path) -> None:
    _, small = pretended(space_of(corpus, tmp_path, "--seeds", "1"))
    state, large = pretended(space_of(corpus, tmp_path, "--seeds", "2"))
    assert {trial.seed for trial in large.started} == {1}
    assert set(small.started) | set(large.started) == set(state.results)


def test_the_verdict_and_the_winner_are_those_of_the_losses(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    space = space_of(corpus, tmp_path, "--parametrisation", "both", "--widths", "16,32,64")
    state, _ = pretended(space)
    mup, standard = judged(state)
    assert mup.passes and mup.verdict == "the learning rate transfers"
    assert mup.transfer and mup.transfer.drift == pytest.approx(0, abs=1e-9)
    assert standard.transfer and standard.transfer.drift == pytest.approx(-1)
    assert standard.transfer.is_control and not standard.passes
    assert winner([standard, mup]) is mup
    page = sweep_page(state, [mup, standard])
    assert "drift +0.00 octaves per doubling of the width [+0.00, +0.00], at most 0.15" in page
    assert "a control has -0.5 or less: yes" in page and "25%" in page
    assert "wider is better at the transferred learning rate: yes" in page


def test_an_optimum_at_an_edge_is_never_reported(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path, "--lr", "2**-30:2**-28")
    state, _ = pretended(space)
    (verdict,) = judged(state)
    assert not verdict.passes and winner([verdict]) is None
    assert "not bracketed: at width 16 the best is the highest that was tried" in verdict.verdict
    assert "not bracketed" in sweep_page(state, [verdict])


def test_a_crash_is_reported_and_the_sweep_goes_on(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path)
    crashing = {a_trial(space, parametrisation="mup", seed=1)}
    state, _ = pretended(space, crashing=crashing)
    (verdict,) = judged(state)
    assert set(state.failures) == crashing and {t.width for t in state.results} == {16, 32}
    assert not verdict.passes and verdict.verdict == "unknown: 1 trials crashed"
    assert "ValueError: broken" in sweep_page(state, [verdict])
    assert sweep_document(state, [verdict])["crashed"][0]["log2_lr"] == -7.0
    # It is no result: the next sweep runs it, and nothing else.
    healed, runner = pretended(space)
    assert runner.started == list(crashing) and not healed.failures


def test_records_hold_every_trial_and_the_verdict(corpus: tuple[str, str], tmp_path: Path) -> None:
    space = space_of(corpus, tmp_path, "--grid", "optimizer.beta2=0.9,0.95")
    state, _ = pretended(space)
    verdicts = judged(state)
    write_records(state, verdicts, tmp_path / "out")
    draw(verdicts, "title", tmp_path / "out" / "sweep.png")
    rows = without_seconds(tmp_path / "out")
    assert len(rows) == len(state.results) and {row["optimizer.beta2"] for row in rows} == {
        "0.9",
        "0.95",
    }
    document = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert [family["passes"] for family in document["families"]] == [True, True]
    assert len(document["trials"]) == len(rows)
    boards = [path for path in (tmp_path / "out" / "tensorboard").iterdir() if path.is_dir()]
    assert len(boards) == len(rows)
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_time_that_is_left_follows_from_what_trials_took(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    space = space_of(corpus, tmp_path, "--seeds", "1")
    state = State(space, Store(space.request.store))
    assert seconds_left(state, 1) is None and "about" not in summary(state, 1)
    state.results[a_trial(space, parametrisation="mup")] = result_of(a_trial(space), 2.0)
    # Two more at width 16 take a second each; five at width 32 the ratio of widths to 1.5.
    assert seconds_left(state, 2) == pytest.approx((2 * 1.0 + 5 * 2**1.5) / 2)
    assert summary(state, 2).startswith("1 of 8 trials, 0 running, about ")
    assert estimate(64, {16: 1.0, 32: 3.0}) == pytest.approx(3 * 2**1.5)


def test_the_table_on_a_terminal_shows_every_point(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    space = space_of(corpus, tmp_path, "--seeds", "2")
    state, _ = pretended(space)
    console = Console(width=120, force_terminal=False)
    console.print(table(state, 2))
    shown = capsys.readouterr().out
    assert "2^-6" in shown and "mup 32" in shown and "2.105" in shown
    lines = Progress(jobs=2)
    lines.show(state)
    assert len(capsys.readouterr().err.splitlines()) == len(state.results)


# The winner in another recipe


def test_the_winner_becomes_a_recipe_and_what_it_leaves_open_is_named(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, output = tmp_path / "store", tmp_path / "out"
    grid = ("--grid", "optimizer.beta2=0.9,0.97", "mup.grows=head_width", "--seeds", "1")
    pretended(space_of(corpus, tmp_path, *grid))
    line = words(corpus, "--store", str(store), "--output", str(output), *grid)
    assert main([*line, "--transfer-to", "gpt_1b_offload"]) == 0
    page = capsys.readouterr().out
    written = output / "gpt_1b_offload-from-fault-drill.toml"
    config = load_recipe(str(written)).config
    target = load_recipe("gpt_1b_offload").config
    assert config.optimizer.peak_lr == pytest.approx(2**-6, rel=1e-3)
    assert config.optimizer.beta2 in (0.9, 0.97)
    assert config.mup.enabled and config.mup.base_width == 16 and config.mup.grows == "head_width"
    assert config.optimizer.warmup_steps == target.optimizer.warmup_steps
    assert config.model == target.model and config.train == target.train
    for said in (
        "width: 16 to 32 -> 2,048, 64 x; beyond the 2 x in width that were tried",
        "layers: 1 -> 24, 24 x; the sweep says nothing about depth",
        "training tokens: 512 -> 10,485,760,000, 2.048e+07 x; the best learning rate falls",
        "tokens per step: 128 -> 524,288, 4096 x; with the root of the batch",
    ):
        assert said in page and said in written.read_text(encoding="utf-8")


def test_what_a_sweep_left_unset_holds_in_a_target_that_sets_it(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    clipped = ("optimizer.rule=clipped_sgd", "optimizer.clip=none", "optimizer.weight_decay=none")
    space = space_of(corpus, tmp_path, *clipped)
    tables = carried_tables(space.configs[()], (), 16, 0.5)
    # It has a decay of 0.01 and clips by norm at 1.0.
    optimizer = load_recipe("ebt_xxs", overrides_of(tables)).config.optimizer
    assert (optimizer.rule, optimizer.weight_decay, optimizer.clip) == ("clipped_sgd", 0.0, 0.0)


def test_a_target_that_is_what_was_swept_is_certified(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    space = space_of(corpus, tmp_path)
    state, _ = pretended(space)
    (best,) = judged(state)
    (axis,) = axes_between(space, best, next(iter(space.configs.values())))
    assert axis.name == "width" and axis.warning == "" and axis.factor is None


def test_nothing_is_written_for_a_target_without_an_optimum(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = ("--lr", "2**-30:2**-28", "--seeds", "1", "mup.grows=head_width")
    pretended(space_of(corpus, tmp_path, *edge))
    folders = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"))
    line = words(corpus, *folders, *edge, "--transfer-to", "gpt_1b_offload")
    assert main(line) == 1
    assert "nothing is written for gpt_1b_offload" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.toml"))


def test_a_target_that_muP_cannot_compare_with_its_base_is_refused_first(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "odd.toml"
    target.write_text('extends = "gpt_1b_offload"\n[model]\nffn_width = 5000\n', "utf-8")
    line = words(corpus, "--store", str(tmp_path / "store"), "--transfer-to", str(target))
    assert main(line) == 2
    expected = f"--transfer-to {target}: mup.base_width=16: model.ffn_width=5000: at width 16 in"
    assert expected in capsys.readouterr().err
