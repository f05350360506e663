"""Numbers that cannot be right: what all ranks make of them, and what is left to look at."""

import hashlib
import json
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from tiny_run import config_of

from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import Progress, open_checkpoint
from interlace.trainer.config import load_recipe
from interlace.trainer.data.rows import Rows, TrainingRows
from interlace.trainer.loop import finished_steps
from interlace.trainer.world import World

Interlace = Callable[..., Any]
LossesOf = Callable[[Path], list[str]]

STEPS = """
import hashlib, json, sys
from interlace.offload.subgroup import local
from interlace.trainer.assembly import open_run
from interlace.trainer.config import load_recipe
from interlace.trainer.world import process_group

def digest(state):
    found = hashlib.sha256()
    for name, tensor in sorted(state.tensors().items()):
        found.update(name.encode() + local(tensor).contiguous().numpy().tobytes())
    return found.hexdigest()

with process_group() as world:
    config = load_recipe(WORDS[0], WORDS[1:]).config
    with open_run(config, world) as run:
        damage(run, world.rank)
        digests = [digest(run.parts.state)]
        for step in run.remaining_steps():
            if step == COUNT:
                break
            run.update_or_skip(step, run.forward_backward(step), run.gradient_norm())
            digests.append(digest(run.parts.state))
        told = {"digests": digests, "progress": run.progress.model_dump()}
        (run.folder.path / f"told-{world.rank}.json").write_text(json.dumps(told))
"""
"""Takes so many steps and leaves this rank's digest after each, and its counters at the end."""

NO_DAMAGE = """
def damage(run, rank):
    pass
"""

IN_THE_LOSS = """
from dataclasses import replace
def damage(run, rank):
    usual = run.parts.objective.loss
    def loss(model, batch):
        found = usual(model, batch)
        wrong = rank == 1 and batch.step == 4
        return replace(found, mean_nll=found.mean_nll * float("nan")) if wrong else found
    run.parts.objective.loss = loss
"""
"""In step 5 the loss of rank 1 is NaN, and no gradient is."""


def told_by_ranks(
    words: Sequence[str], count: int, home: Path, damage: str = NO_DAMAGE
) -> list[dict[str, Any]]:
    """Take steps on two ranks; return what each of them left."""
    run = home / "run"
    script = f"WORDS, COUNT = {[*words, f'run.dir={run}']!r}, {count}\n{damage}\n{STEPS}"
    done = run_on_ranks(script, home)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((run / f"told-{rank}.json").read_text()) for rank in range(2)]


def records_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def progress_of(run: Path, step: int) -> Progress:
    """Return the counters that a checkpoint holds."""
    return open_checkpoint(CheckpointStore(run / "checkpoints"), step).scalars.progress


def test_f1_a_gradient_or_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "step.loss@3:nan")
    monkeypatch.setenv("INTERLACE_FAILPOINT_RANK", "1")
    first, second = told_by_ranks(tiny, 6, tmp_path, IN_THE_LOSS)
    assert first["progress"] == second["progress"]
    assert first["progress"]["step"] == 6
    assert first["progress"]["skipped_steps"] == 2
    assert first["progress"]["skipped_in_a_row"] == 0
    for told in (first, second):
        before = told["digests"]
        assert before[3] == before[2]
        assert before[5] == before[4]
        assert len(set(before)) == 5


@pytest.mark.faults
def test_f2_nan_again_and_again_stops_the_run_and_one_process_finds_the_first_again(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    stop = {"INTERLACE_FAILPOINT": "step.update@7:sigterm"}
    assert interlace("train", *tiny, f"run.dir={run}", ranks=2, environment=stop).returncode == 0
    assert CheckpointStore(run / "checkpoints").committed_steps()[-1] == 8
    # Weights that such a rate makes are finite, and the losses that follow are not.
    words = ("optimizer.peak_lr=1e30", "train.max_bad_steps=3")
    done = interlace("train", str(run / "config.toml"), *words, f"run.dir={run}", ranks=2)
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    assert [record["step"] for record in records_of(run) if "skipped" in record] == [10, 11]
    [evidence] = (run / "evidence").iterdir()
    assert evidence.name == "step-00000012"
    assert sorted(path.name for path in evidence.glob("*.json")) == [
        "rank-00000.json",
        "rank-00001.json",
    ]
    assert CheckpointStore(run / "checkpoints").committed_steps() == [5, 8]

    advice = re.search(
        r"interlace (train --resume \S+ --from-step 8) run.dir=NEW (\S+)", done.stderr
    )
    assert advice is not None, done.stderr
    repeated = interlace(*advice[1].split(), f"run.dir={again}", advice[2])
    assert repeated.returncode == 65, repeated.stdout + repeated.stderr
    assert "determinism lowered to D1: world_size is now 1, was 2" in repeated.stdout
    [evidence] = (again / "evidence").iterdir()
    assert evidence.name == "step-00000010"
    document = json.loads((evidence / "rank-00000.json").read_text())
    assert "embedding.weight" in document["gradients_not_finite"]
    assert document["weights_not_finite"] == []
    assert document["rows"] == [list(range(9 * 8, 10 * 8))]


SPIKES = ("guard.spike_sigmas=8.0", "guard.spike_window=12")


@pytest.mark.faults
def test_f3_a_spike_on_one_rank_is_skipped_on_all(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "step.loss@9:spike")
    monkeypatch.setenv("INTERLACE_FAILPOINT_RANK", "1")
    first, second = told_by_ranks((*tiny, *SPIKES), 10, tmp_path)
    assert first["progress"] == second["progress"]
    assert first["progress"]["skipped_steps"] == 1
    assert first["progress"]["spikes"]["recent"] == [9]
    assert len(first["progress"]["spikes"]["norms"]) == 9
    for told in (first, second):
        assert told["digests"][9] == told["digests"][8]
        assert len(set(told["digests"])) == 10


@pytest.mark.faults
def test_f3_the_rule_goes_on_after_a_kill_as_if_there_had_been_none(
    interlace: Interlace, losses_of: LossesOf, tiny: Sequence[str], tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    words = ("train", *tiny, *SPIKES, "train.steps=20", "checkpoint.asynchronous=false")
    spike = {"INTERLACE_FAILPOINT": "step.loss@14:spike"}
    assert interlace(*words, f"run.dir={undisturbed}", environment=spike).returncode == 0
    kill = {"INTERLACE_FAILPOINT": "step.update@12:kill"}
    assert interlace(*words, f"run.dir={killed}", environment=kill).returncode == -9
    # Step 14 is the fourth after the checkpoint of step 10.
    spike = {"INTERLACE_FAILPOINT": "step.loss@4:spike"}
    done = interlace("train", "--resume", str(killed), environment=spike)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "standard deviations above the mean of the last 12 steps; update skipped" in done.stdout
    assert losses_of(killed) == losses_of(undisturbed)
    assert [record["step"] for record in records_of(killed) if "skipped" in record] == [14]
    assert progress_of(killed, 20) == progress_of(undisturbed, 20)
    assert progress_of(killed, 20).spikes.recent == (14,)


def test_f3_a_new_start_remembers_the_values_that_steps_are_held_against(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    config = config_of(tiny, tmp_path / "run", *SPIKES, "train.steps=8")
    with open_run(config, World()) as run:
        assert next(step for step in finished_steps(run) if step == 4)
        run.conclude()
        before = run.progress
    assert (len(before.spikes.losses), len(before.spikes.norms)) == (5, 5)
    with open_run(config, World()) as again:
        assert again.progress == before


def digest_of_folder(folder: Path) -> dict[str, str]:
    """Return the digest of every file, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.faults
def test_f4_a_branch_leaves_batches_out_and_the_run_it_came_from_alone(
    interlace: Interlace,
    losses_of: LossesOf,
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    words = ("train", *tiny, "train.steps=15", "checkpoint.keep_last=9")
    assert interlace(*words, f"run.dir={run}").returncode == 0
    before = digest_of_folder(run)
    ledger: list[int] = []
    whole = TrainingRows.row

    def noted(self: TrainingRows, step: int, number: int) -> Rows:
        ledger.append(self.place(step, number))
        return whole(self, step, number)

    monkeypatch.setattr(TrainingRows, "row", noted)
    overrides = [
        f"run.dir={branch}",
        f"run.branch_of={run}",
        "run.branch_step=5",
        "data.skip_batches=8:12",
    ]
    config = load_recipe(str(run / "config.toml"), overrides).config
    with open_run(config, World()) as opened:
        for _ in finished_steps(opened):
            pass
        opened.conclude()
    rows = 8
    assert ledger == [*range(5 * rows, 7 * rows), *range(11 * rows, 19 * rows)]
    assert digest_of_folder(run) == before
    assert losses_of(branch)[:7] == losses_of(run)[:7]
    assert losses_of(branch)[7] != losses_of(run)[7]
    saved = load_recipe(str(branch / "config.toml")).config
    assert saved.data.skip_batches == "8:12"
    assert (saved.run.branch_of, saved.run.branch_step) == (str(run), 5)
    assert CheckpointStore(branch / "checkpoints").committed_steps()[-1] == 15


STOPS = """
import json, sys, torch
from interlace.offload.subgroup import local
from interlace.trainer.assembly import open_run
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import NumericsError
from interlace.trainer.loop import finished_steps
from interlace.trainer.world import process_group

def flip(values, bit):
    local(values).data.reshape(-1).view(torch.int32)[0] ^= 1 << bit

with process_group() as world:
    config = load_recipe(WORDS[0], WORDS[1:]).config
    stopped = ""
    try:
        with open_run(config, world) as run:
            for step in finished_steps(run):
                damage(run, step + 1, world.rank)
    except NumericsError as error:
        stopped = str(error)
    told = run.folder.path / f"told-{world.rank}.json"
    told.write_text(json.dumps({"stopped": stopped, "step": run.progress.step}))
"""
"""Trains until something is found; `damage` is called after every step, with its number from 1."""

IN_A_REPETITION = """
def damage(run, step, rank):
    if step != 7 or rank != 1:
        return
    objective = run.parts.objective
    weight = run.parts.model.get_parameter("layers.1.blocks.1.mixer.gate.weight")
    usual, calls = objective.loss, [0]
    def loss(model, batch):
        if calls[0] < 2:
            flip(weight, BIT)
        calls[0] += 1
        return usual(model, batch)
    objective.loss = loss
"""
"""In step 8 the first computation, which is dropped, sees another weight; the next one puts it
right."""

IN_IDLE_STATE = """
from interlace.trainer.engines.fsdp2 import own_optimizer

def damage(run, step, rank):
    if step == 6 and rank == 1:
        optimizer = own_optimizer(run.parts.state.engine)
        optimizer.synchronize()
        flip(optimizer.subgroups[-1].slabs["exp_avg"], 0)
"""


def stopped_ranks(damage: str, words: Sequence[str], home: Path) -> list[dict[str, Any]]:
    """Train on two ranks until the damage is found; return why and when each of them stopped."""
    run = home / "run"
    script = f"WORDS = {[*words, f'run.dir={run}']!r}\n{damage}\n{STOPS}"
    done = run_on_ranks(script, home)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((run / f"told-{rank}.json").read_text()) for rank in range(2)]


def test_f5_a_mantissa_bit_that_flips_during_a_repetition_is_found_though_the_loss_is_the_same(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, "guard.recompute_every_steps=4")
    told = stopped_ranks(IN_A_REPETITION.replace("BIT", "0"), words, tmp_path)
    assert [each["step"] for each in told] == [7, 7]
    host = re.escape(socket.gethostname())
    for each in told:
        assert re.search(rf"on rank 1 \(host {host}\).*; transient: ", each["stopped"])
        # The checkpoint of step 5 is younger than the repetition of step 4, which agreed.
        assert "there is no checkpoint from before step 5" in each["stopped"]
    evidence = tmp_path / "run" / "evidence" / "sdc-step-00000008"
    reports = [json.loads((evidence / f"rank-0000{rank}.json").read_text()) for rank in range(2)]
    assert reports[1]["differing_bits"]
    assert "loss" not in reports[0]["differing_bits"] | reports[1]["differing_bits"]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").committed_steps() == [5]


@pytest.mark.faults
def test_f5_the_checks_change_nothing_on_two_ranks(tiny: Sequence[str], tmp_path: Path) -> None:
    checks = ("guard.recompute_every_steps=2", "guard.check_state_every_steps=1")
    found: list[list[dict[str, Any]]] = []
    for name, words in (("plain", ()), ("checked", checks)):
        home = tmp_path / name
        home.mkdir()
        found.append(told_by_ranks((*tiny, "offload.strategy=host", *words), 5, home))
    assert found[0] == found[1]


@pytest.mark.faults
def test_f6_a_bit_that_flips_in_idle_state_of_one_rank_is_found_and_named_before_a_save(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, "offload.strategy=host", "guard.check_state_every_steps=1")
    told = stopped_ranks(IN_IDLE_STATE, (*words, "checkpoint.every_steps=3"), tmp_path)
    assert [each["step"] for each in told] == [6, 6]
    for each in told:
        assert "exp_avg of subgroup 1 on rank 1" in each["stopped"]
        assert "--from-step 3 run.dir=NEW" in each["stopped"]
    evidence = tmp_path / "run" / "evidence" / "state-step-00000007"
    report = json.loads((evidence / "rank-00001.json").read_text())
    assert report["host"] == socket.gethostname()
    [chunk] = report["chunks"]
    assert chunk["slab"] == "exp_avg"
    assert json.loads((evidence / "rank-00000.json").read_text())["chunks"] == []
    # The save of step 6 was being written, of memory that may have been wrong already.
    assert CheckpointStore(tmp_path / "run" / "checkpoints").committed_steps() == [3]
