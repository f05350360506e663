"""Steps that are left out, on runs of a few steps in this process: what is counted and saved."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint import failpoints
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import NumericsError
from interlace.trainer.guards.spikes import SpikeMemory
from interlace.trainer.loop import finished_steps
from interlace.trainer.run import Run
from interlace.trainer.world import World


def run_to_the_end(words: Sequence[str]) -> Run:
    """Train in this process; return the run as it ended."""
    config = load_recipe(words[0], words[1:]).config
    with open_run(config, World()) as run:
        for _ in finished_steps(run):
            pass
        run.conclude()
        return run


@pytest.fixture(autouse=True)
def count_visits_from_1() -> None:
    failpoints.forget_visits()


def skipped_steps(run: Run) -> list[int]:
    """Return the steps, from 1, that the metrics call skipped."""
    lines = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for line in lines if "skipped" in (record := json.loads(line))]


def test_a_state_whose_last_step_was_not_finite_is_not_saved_in_place_of_a_sound_one(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "step.loss@10:nan")
    words = (*tiny, f"run.dir={tmp_path / 'run'}", "train.steps=17", "checkpoint.keep_last=9")
    run = run_to_the_end(words)
    assert run.folder.store.committed_steps() == [5, 15, 17]
    assert skipped_steps(run) == [10]
    assert run.progress.skipped_steps == 1
    assert run.progress.skipped_in_a_row == 0


def test_a_spike_is_skipped_counted_and_shown_and_does_not_count_as_not_finite(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "step.loss@12:spike")
    words = (*tiny, f"run.dir={tmp_path / 'run'}", "train.steps=14")
    run = run_to_the_end((*words, "guard.spike_sigmas=8.0", "guard.spike_window=16"))
    assert skipped_steps(run) == [12]
    assert run.progress.skipped_steps == 1
    memory = run.progress.spikes
    assert (memory.skipped, memory.recent) == (1, (12,))
    assert len(memory.losses) == len(memory.norms) == 13
    assert max(memory.norms) < 10.0


def test_without_the_rule_nothing_is_remembered(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "step.loss@12:spike")
    run = run_to_the_end((*tiny, f"run.dir={tmp_path / 'run'}", "train.steps=14"))
    assert skipped_steps(run) == []
    assert run.progress.spikes == SpikeMemory()


def test_as_many_spikes_as_are_allowed_stop_the_run_and_the_way_back_keeps_older_gaps(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv(failpoints.VARIABLE, "step.loss@8:spike")
    words = (*tiny, f"run.dir={run}", "data.skip_batches=2:4", "guard.max_spikes=1")
    with pytest.raises(NumericsError) as caught:
        run_to_the_end((*words, "guard.spike_sigmas=8.0", "guard.spike_window=12"))
    said = str(caught.value)
    assert said.startswith("1 updates within 50 steps were skipped as spikes (guard.max_spikes=1)")
    assert said.endswith(
        f"interlace train --resume {run} --from-step 5 run.dir=NEW data.skip_batches=2:4,10:11"
    )
    assert (run / "evidence" / "step-00000008" / "rank-00000.safetensors").is_file()


def test_a_rule_that_may_skip_lets_updates_begin_after_backward_only(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, "offload.strategy=host", "optimizer.rule=clipped_sgd", "train.steps=1")
    plain = run_to_the_end((*words, f"run.dir={tmp_path / 'plain'}"))
    assert plain.parts.state.engine.overlap == "backward"
    guarded = run_to_the_end((*words, f"run.dir={tmp_path / 'guarded'}", "guard.spike_sigmas=6"))
    assert guarded.parts.state.engine.overlap == "forward"


@pytest.mark.long
def test_six_sigmas_let_a_clean_run_of_a_usual_batch_pass(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, f"run.dir={tmp_path / 'run'}", "train.steps=300", "train.tokens_per_step=2048")
    run = run_to_the_end((*words, "guard.spike_sigmas=6.0"))
    assert run.progress.spikes.skipped == 0
