"""A run that is killed anywhere and resumed has the losses it would have had, to the last bit."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import train_here

from interlace.trainer import assembly
from interlace.trainer.assembly import assemble, open_run, restore
from interlace.trainer.checkpoint.commit import CheckpointStore, Superseded
from interlace.trainer.config import load_recipe
from interlace.trainer.data.prepare import find_prepared
from interlace.trainer.errors import ConfigError
from interlace.trainer.run_folder import open_run_folder
from interlace.trainer.world import World

KILL_POINTS = (
    "step.forward@13",
    "step.backward@8",
    "step.update@3",
    "persist.open",
    "persist.half",
    "persist.pre_fsync",
    "persist.post_rename",
    "manifest.pre",
    "manifest.half",
    "publish.pre_rename",
    "publish.post_rename",
    "retain.mid",
    "load.mid@4",
)
"""Forward, backward, update, every phase of a save, retention and loading."""


@pytest.fixture(scope="module")
def straight(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The undisturbed run on so many ranks; made once each."""
    runs: dict[int, Path] = {}

    def run_of(ranks: int) -> Path:
        if ranks not in runs:
            runs[ranks] = tmp_path_factory.mktemp("straight") / f"on-{ranks}"
            done = interlace("train", *tiny, f"run.dir={runs[ranks]}", ranks=ranks)
            assert done.returncode == 0, done.stdout + done.stderr
        return runs[ranks]

    return run_of


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_every_point_has_the_losses_of_the_straight_run(
    ranks: int,
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    straight: Callable[[int], Path],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for number, point in enumerate(KILL_POINTS):
        victim = {"INTERLACE_FAILPOINT": f"{point}:kill"}
        # Saves are published by rank 0; the points of the others are hit on rank 1 where there is
        # one.
        alone = point.startswith(("manifest", "publish", "retain"))
        victim["INTERLACE_FAILPOINT_RANK"] = "0" if ranks == 1 or alone or number % 2 else "1"
        done = interlace("train", *tiny, f"run.dir={run}", ranks=ranks, environment=victim)
        expected = -signal.SIGKILL if ranks == 1 else 1
        assert done.returncode == expected, f"{point}: {done.stdout}{done.stderr}"
    done = interlace("train", "--resume", str(run), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from the checkpoint of step" in done.stdout
    expected_losses = losses_of(straight(ranks))
    assert len(expected_losses) == 40
    assert losses_of(run) == expected_losses


def test_a_signal_finishes_the_step_saves_and_exits_with_zero(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    straight: Callable[[int], Path],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for ranks, action in ((1, "step.backward@7:sigterm"), (2, "step.forward@4:sigint")):
        environment = {"INTERLACE_FAILPOINT": action, "INTERLACE_FAILPOINT_RANK": str(ranks - 1)}
        done = interlace("train", *tiny, f"run.dir={run}", ranks=ranks, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"interlace train --resume {run}" in done.stdout
    steps = sorted(path.name for path in (run / "checkpoints" / "committed").iterdir())
    assert steps[-1] == "00000011"
    done = interlace("train", "--resume", str(run))
    assert "resumed from the checkpoint of step 11" in done.stdout
    assert len(losses_of(run)) == 40
    assert losses_of(run)[:7] == losses_of(straight(1))[:7]


def test_a_finished_run_is_left_alone(
    interlace: Callable[..., Any], straight: Callable[[int], Path]
) -> None:
    before = sorted((straight(1) / "checkpoints" / "committed").iterdir())
    done = interlace("train", "--resume", str(straight(1)))
    assert done.returncode == 0
    assert "finished 40 steps" in done.stdout
    assert sorted((straight(1) / "checkpoints" / "committed").iterdir()) == before


@pytest.mark.parametrize("more", [(), ("model.width=16",)], ids=["the same", "another model"])
def test_a_start_goes_on_from_what_another_saved_while_it_prepared(
    more: Sequence[str], tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, measured = tmp_path / "run", assembly.hardware_for

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(assembly, "hardware_for", measured)
        train_here(tiny, run, "train.steps=6")
        return measured(*arguments)

    monkeypatch.setattr(assembly, "hardware_for", meanwhile)
    words = (*more, "train.steps=8", "train.validate_every_steps=0")
    if more:
        with pytest.raises(ConfigError, match=r"model\.width=16: the run in .* was started"):
            train_here(tiny, run, *words)
        return
    assert "resumed from the checkpoint of step 6" in train_here(tiny, run, *words)
    assert CheckpointStore(run / "checkpoints").committed_steps()[-1] == 8


def test_a_run_can_be_made_longer(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interlace("train", *tiny, f"run.dir={run}", "train.steps=5")
    done = interlace("train", "--resume", str(run), "train.steps=8")
    assert done.returncode == 0, done.stderr
    assert "train.steps is now 8, was 5" in done.stdout
    assert "finished 8 steps" in done.stdout


def test_another_model_cannot_continue_a_run(
    interlace: Callable[..., Any], straight: Callable[[int], Path]
) -> None:
    run = straight(1)
    done = interlace("train", "--resume", str(run), "model.width=64", "run.seed=3")
    assert done.returncode == 2
    assert done.stderr == (
        f"interlace: run.seed=3: the run in {run} was started with 0, and its checkpoints do not "
        "fit "
        f"another; type run.seed=0 or another run.dir\n"
        f"model.width=64: the run in {run} was started with 32, and its checkpoints do not fit "
        "another; "
        f"type model.width=32 or another run.dir\n"
    )


def test_a_full_disk_fails_the_save_and_not_the_run(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    straight: Callable[[int], Path],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    done = interlace(
        "train",
        *tiny,
        f"run.dir={run}",
        "checkpoint.keep_last=9",
        environment={"INTERLACE_FAILPOINT": "persist.open@2:enospc"},
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint at step 10 failed: " in done.stdout
    assert "No space left on device" in done.stdout
    steps = sorted(path.name for path in (run / "checkpoints" / "committed").iterdir())
    assert "00000005" in steps
    assert "00000010" not in steps
    assert steps[-1] == "00000040"
    assert interlace("verify", str(run)).returncode == 0
    assert losses_of(run) == losses_of(straight(1))


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    straight: Callable[[int], Path],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    stop = {"INTERLACE_FAILPOINT": "step.forward@24:kill"}
    interlace("train", *tiny, f"run.dir={run}", environment=stop)
    [shard] = (run / "checkpoints" / "committed" / "00000020").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    verdict = interlace("verify", str(run))
    assert verdict.returncode == 2
    assert shard.name in verdict.stdout
    assert "BROKEN" in verdict.stdout
    done = interlace("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert shard.name in done.stdout
    assert "resumed from the checkpoint of step 15" in done.stdout
    assert losses_of(run) == losses_of(straight(1))
    assert interlace("verify", str(run)).returncode == 0


def test_a_changed_corpus_cannot_continue_a_run(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be or not to be\n" * 4000, encoding="utf-8")
    words = ("train", *tiny, f"data.source={text}", f"run.dir={run}", "train.steps=2")
    assert interlace(*words).returncode == 0
    text.write_text("that is the question\n" * 4000, encoding="utf-8")
    done = interlace("train", "--resume", str(run), "train.steps=4")
    assert done.returncode == 2
    assert "is not the one this run was started with" in done.stderr


def test_numbers_that_are_not_finite_skip_the_update_and_then_stop_the_run_with_evidence(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = interlace(
        "train", *tiny, f"run.dir={run}", "optimizer.peak_lr=1e30", "train.max_bad_steps=3"
    )
    assert done.returncode == 65
    assert "is not finite; update skipped (1 in a row, 3 stop the run)" in done.stdout
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    [evidence] = (run / "evidence").iterdir()
    assert sorted(path.suffix for path in evidence.iterdir()) == [".json", ".safetensors"]


def test_a_run_that_was_started_again_stops_at_its_next_save(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = load_recipe(tiny[0], [*tiny[1:], f"run.dir={run_dir}"]).config
    with pytest.raises(Superseded, match="is not the live one"), open_run(config, World()) as run:
        store = run.folder.store
        store.begin_attempt()
        for step in run.remaining_steps():
            run.update_or_skip(step, run.forward_backward(step), run.gradient_norm())
            run.checkpoint_if_due()
    assert run.progress.step == 5
    assert store.committed_steps() == []


def test_a_superseded_start_may_not_set_a_broken_checkpoint_aside(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    interlace("train", *tiny, f"run.dir={run_dir}", "train.steps=10")
    config = load_recipe(str(run_dir / "config.toml"), [f"run.dir={run_dir}"]).config
    folder = open_run_folder(config)
    parts, _, _ = assemble(config, World())
    corpus = find_prepared(config.data)
    assert corpus is not None
    [shard] = (run_dir / "checkpoints" / "committed" / "00000010").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    folder.store.begin_attempt()
    with pytest.raises(Superseded, match="is not the live one"):
        restore(folder, parts.attempt, parts.state, corpus, parts.manifest)
    assert folder.store.committed_steps() == [5, 10]
