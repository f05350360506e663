"""The recompute probe and the check of idle state, on runs of a few steps in this process."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.offload.subgroup import local
from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config import load_recipe
from interlace.trainer.engines.fsdp2 import own_optimizer
from interlace.trainer.errors import NumericsError
from interlace.trainer.loop import finished_steps
from interlace.trainer.objectives import Loss
from interlace.trainer.run import Run
from interlace.trainer.world import World

WAYS = {
    "on the device": (),
    "on the host": ("offload.strategy=host",),
    "on the host, two passes": ("offload.strategy=host", "train.microbatch_rows=4"),
    "beside backward": (
        "offload.strategy=host",
        "optimizer.rule=clipped_sgd",
        "optimizer.peak_lr=1.0",
        "offload.subgroup_elements=4000",
    ),
    "an energy model that replays": (
        "train.objective=energy",
        "energy.replay_rows=8",
        "energy.replay_share=0.5",
        "train.microbatch_rows=4",
    ),
}

AfterStep = Callable[[Run, int], None]


def take_steps(
    words: Sequence[str], count: int, before: AfterStep | None = None
) -> tuple[list[str], str]:
    """Take steps of a run in this process; return the bits of the losses and a digest of the state.

    Args:
        words: Of `train`, `run.dir` among them.
        count: How many steps.
        before: Called with the run before each step, with its number from 0.
    """
    config = load_recipe(words[0], words[1:]).config
    losses: list[str] = []
    with open_run(config, World()) as run:
        if before is not None:
            before(run, 0)
        for step in finished_steps(run):
            losses.append(run.notes.loss.hex())
            if step + 1 == count:
                return losses, digest_of(run.parts.state)
            if before is not None:
                before(run, step + 1)
    raise AssertionError("the run ended before")


def digest_of(state: TrainingState) -> str:
    """Return the digest of all tensors of a training state."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.tensors().items()):
        found.update(name.encode() + local(tensor).contiguous().numpy().tobytes())
    return found.hexdigest()


def flip(values: torch.Tensor, element: int, bit: int) -> None:
    """Flip one bit of an fp32 tensor, unnoticed by its version counter."""
    words = local(values).data.reshape(-1).view(torch.int32)
    words[element] ^= 1 << bit


@pytest.mark.parametrize("way", WAYS)
def test_a_run_with_all_checks_is_bit_for_bit_the_run_without(
    way: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, *WAYS[way], "train.validate_every_steps=0")
    checks = ["guard.recompute_every_steps=2"]
    if "offload.strategy=host" in words:
        checks.append("guard.check_state_every_steps=1")
    plain = take_steps((*words, f"run.dir={tmp_path / 'plain'}"), 4)
    assert take_steps((*words, *checks, f"run.dir={tmp_path / 'checked'}"), 4) == plain
    assert not (tmp_path / "checked" / "evidence").exists()


def test_random_numbers_are_the_same_in_every_computation_and_go_on_as_without_the_probe(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(run: Run, step: int) -> None:
        if step:
            return
        objective = run.parts.objective
        usual = objective.loss

        def loss(model: Any, batch: Any) -> Loss:
            found = usual(model, batch)
            return replace(found, objective=found.objective * torch.rand(()))

        monkeypatch.setattr(objective, "loss", loss)

    plain = take_steps((*tiny, f"run.dir={tmp_path / 'plain'}"), 4, draw)
    words = (*tiny, "guard.recompute_every_steps=2", f"run.dir={tmp_path / 'checked'}")
    assert take_steps(words, 4, draw) == plain


def flip_while_computing(
    monkeypatch: pytest.MonkeyPatch, calls: dict[int, int]
) -> Callable[[Run, int], None]:
    """Return what makes the given computations of a run, by number from 0, see a weight of which
    the given bit is flipped. All of them draw a random number that they use.
    """

    def arrange(run: Run, step: int) -> None:
        if step:
            return
        objective = run.parts.objective
        weight = run.parts.model.get_parameter("layers.0.blocks.1.mixer.up.weight")
        usual, number, wrong = objective.loss, 0, -1

        def loss(model: Any, batch: Any) -> Loss:
            nonlocal number, wrong
            if wrong >= 0:
                flip(weight, 0, wrong)
            wrong = calls.get(number, -1)
            if wrong >= 0:
                flip(weight, 0, wrong)
            number += 1
            found = usual(model, batch)
            return replace(found, objective=found.objective * torch.rand(()))

        monkeypatch.setattr(objective, "loss", loss)

    return arrange


def sdc_report(run: Path) -> dict[str, Any]:
    """Return the report of the only rank and step."""
    [path] = (run / "evidence").glob("sdc-step-*/rank-00000.json")
    return json.loads(path.read_text())


# Steps 1 and 2 compute once and twice, the third computation of step 2 is number 3.
@pytest.mark.parametrize(
    ("calls", "verdict"),
    [
        pytest.param({1: 12}, "transient", id="the repetition was wrong"),
        pytest.param({2: 12}, "transient", id="what counts was wrong"),
        pytest.param({1: 12, 3: 13}, "persistent", id="every computation differs"),
    ],
)
def test_a_third_computation_tells_what_kind_of_fault_it_is(
    calls: dict[int, int],
    verdict: str,
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    words = (*tiny, "guard.recompute_every_steps=2", f"run.dir={run}")
    with pytest.raises(NumericsError, match=f"gave other bits in .* on rank 0 .*; {verdict}: "):
        take_steps(words, 4, flip_while_computing(monkeypatch, calls))
    report = sdc_report(run)
    assert report["verdict"] == verdict
    assert report["step"] == 2
    assert report["rows"] == list(range(8, 16))
    assert report["differing_bits"]


def test_where_updates_began_during_backward_there_is_no_third_computation(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *WAYS["beside backward"], "guard.recompute_every_steps=2", f"run.dir={run}")
    with pytest.raises(NumericsError, match=r"undecided: offload\.overlap=backward had begun"):
        take_steps(words, 4, flip_while_computing(monkeypatch, {1: 12}))
    assert sdc_report(run)["verdict"] == "undecided"


def test_a_step_that_is_not_probed_does_not_notice(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*tiny, "guard.recompute_every_steps=2", f"run.dir={tmp_path / 'run'}")
    take_steps(words, 3, flip_while_computing(monkeypatch, {0: 12}))


@pytest.mark.parametrize("way", ["on the host", "beside backward"])
def test_a_bit_that_flips_in_idle_state_is_found_before_it_is_used(
    way: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (*tiny, *WAYS[way], "guard.check_state_every_steps=1", f"run.dir={run_dir}")
    seen: list[str] = []

    def flip_in_state(run: Run, step: int) -> None:
        if step == 2:
            own_optimizer(run.parts.state.engine).synchronize()
            subgroup = own_optimizer(run.parts.state.engine).subgroups[0]
            names = {id(p): name for name, p in run.parts.model.named_parameters()}
            seen.extend(names[id(member.parameter)] for member in subgroup.members)
            flip(subgroup.slabs["master"], 0, 3)

    with pytest.raises(NumericsError, match="step 3: optimizer state on the host changed while"):
        take_steps(words, 4, flip_in_state)
    [path] = (run_dir / "evidence").glob("state-step-00000003/rank-00000.json")
    [chunk] = json.loads(path.read_text())["chunks"]
    assert (chunk["subgroup"], chunk["slab"]) == (0, "master")
    assert chunk["tensors"] == seen
    assert not (run_dir / "checkpoints" / "committed" / "00000005").exists()


def test_state_that_is_not_due_is_not_checked(tiny: Sequence[str], tmp_path: Path) -> None:
    words = (*tiny, *WAYS["on the host"], "guard.check_state_every_steps=3")

    def flip_in_state(run: Run, step: int) -> None:
        if step == 1:
            own_optimizer(run.parts.state.engine).synchronize()
            flip(own_optimizer(run.parts.state.engine).subgroups[0].slabs["master"], 0, 3)

    take_steps((*words, f"run.dir={tmp_path / 'run'}"), 4, flip_in_state)
