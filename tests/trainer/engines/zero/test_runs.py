"""Runs under ZeRO are those of one plain process, step by step: undisturbed, with steps that are
left out, and moved between engines and numbers of ranks.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from digests import stored_digest
from engine_runs import CUTTING, ZERO, Seen, made
from foreign_cases import saved

from interlace.launch.cli import main
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import DataSection
from interlace.trainer.model_folder import write_model_folder

LIMIT = 1e-5
"""How far apart losses may be, in nats per token."""

STAGES, HOMES, PASSES = (1, 2, 3), ("none", "host", "optimal"), (1, 3)


def zero(stage: int, home: str = "none", passes: int = 1) -> tuple[str, ...]:
    """Return the words for a stage, a strategy of offloading and passes of each step on 2 ranks.
    With stage 3 and state on the host all weights are cut; else tiny ones are whole everywhere.
    """
    rows = f"train.microbatch_rows={6 // passes}"
    own = f"parallel.deepspeed_config={CUTTING if (stage, home) == (3, 'host') else ''}"
    return (ZERO, f"parallel.zero_stage={stage}", own, f"offload.strategy={home}", rows)


def named(stage: int, home: str, passes: int) -> str:
    return f"zero{stage}-{home}-{passes}"


PARITY = {
    named(stage, home, passes): zero(stage, home, passes)
    for stage in STAGES
    for home in HOMES
    for passes in PASSES
}
QUICK = ("zero1-host-3", "zero2-none-3", "zero2-optimal-1", "zero3-none-1", "zero3-host-3")
"""Those that every test run makes; the others are made by the long one."""

NAN, SPIKE = "at=step.loss@7:nan", "at=step.loss@9:spike"
SPIKES = ("guard.spike_sigmas=8", "guard.spike_window=8")
SKIPPING = {
    "nan-fsdp2": (NAN, "on=0"),
    "nan-zero1": (*zero(1), NAN, "on=0"),
    # The second of the three passes of step 7.
    "nan-zero1-host": (*zero(1, "host", 3), "at=step.loss@20:nan", "on=0"),
    "nan-zero2": (*zero(2, "none", 3), "at=step.loss@20:nan", "on=0"),
    "nan-zero2-host": (*zero(2, "host"), NAN, "on=0"),
    "nan-zero3": (*zero(3, "none", 3), "at=step.loss@20:nan", "on=0"),
    "nan-zero3-host": (*zero(3, "host", 3), "at=step.loss@20:nan", "on=0"),
    "spike-fsdp2": (SPIKE, *SPIKES),
    "spike-zero1": (*zero(1), SPIKE, *SPIKES),
    "spike-zero2-host": (*zero(2, "host"), SPIKE, *SPIKES),
    "spike-zero3": (*zero(3), SPIKE, *SPIKES),
    "spike-zero3-host": (*zero(3, "host"), SPIKE, *SPIKES),
}

FSDP2 = (
    "parallel.engine=fsdp2",
    "parallel.zero_stage=3",
    "parallel.deepspeed_config=",
    "offload.strategy=none",
)
MOVED = {
    "move-a": (FSDP2, zero(3), zero(1, "host")),
    "move-b": (zero(3, "host", 3), FSDP2, zero(2)),
    "move-c": (zero(1), zero(2, "optimal"), FSDP2),
}
"""Words of the three parts of a run, on 2 ranks, 1 and 2."""

ALONE = {
    "alone-zero1-host": zero(1, "host"),
    "alone-zero2": zero(2, "none", 3),
    "alone-zero3-host": zero(3, "host"),
}
ENERGY = ("train.objective=energy", "energy.step_size=5", "optimizer.peak_lr=1e-4")
MUP = ("mup.enabled=true", "mup.base_width=16", "model.kv_heads=2")

SHAPE = ModelSection(
    width=32,
    heads=2,
    pattern="AF",
    layers=3,
    ffn_width=48,
    mamba_head_width=16,
    mamba_state_width=16,
    mamba_groups=2,
    mamba_expand=1.0,
)


@dataclass
class Shown:
    """What came of all runs.

    Attributes:
        parts: Of each run, what was seen after every part of it.
    """

    folder: Path
    parts: dict[str, list[Seen]] = field(default_factory=dict[str, list[Seen]])

    def __getitem__(self, name: str) -> Seen:
        return self.parts[name][-1]

    def add(self, made: dict[str, Seen]) -> None:
        for name, seen in made.items():
            self.parts.setdefault(name, []).append(seen)


@pytest.fixture(scope="module")
def distill(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The words of a run in which a student learns, and most of its weights are frozen."""
    root = tmp_path_factory.mktemp("teacher")
    model = saved(SHAPE, root / "run")
    (root / "model").mkdir()
    config = model.config.model_copy(update={"data": DataSection(sequence_length=32)})
    weights = model.model.state_dict()
    write_model_folder(weights, config, model.tokenizer, root / "model", description="a teacher")
    words = ["hybridize", str(root / "model"), "--keep-attention", "every=2"]
    assert main([*words, "--to", str(root / "student")]) == 0
    return (
        "model.pattern=MF AF MF",
        "model.layers=1",
        "model.kv_heads=2",
        "model.ffn_width=48",
        "model.mamba_head_width=16",
        "model.mamba_state_width=16",
        "model.mamba_groups=2",
        "model.mamba_expand=1.0",
        "train.objective=distill",
        f"distill.teacher={root / 'model'}",
        f"run.start_from={root / 'student'}",
    )


@pytest.fixture(scope="module")
def shown(
    corpus: Sequence[str], distill: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Shown:
    """Make all runs: on two ranks, on one, and on two again."""
    shown = Shown(tmp_path_factory.mktemp("runs"))
    frozen = {name: MOVED[name] for name in ("move-b", "move-c")}

    def part(number: int, more: dict[str, Sequence[str]], ranks: int) -> None:
        stops = () if number == 2 else ("at=step.update@4:sigterm",)
        # Three passes of a step on one rank are three of four rows.
        legs = {name: (*parts[number], *stops) for name, parts in MOVED.items()}
        legs |= {f"distill-{n}": (*distill, *p[number], *stops) for n, p in frozen.items()}
        shown.add(made({**legs, **more}, shown.folder, corpus, ranks))

    quick = {name: PARITY[name] for name in QUICK}
    mup = {f"mup-zero{stage}": (*MUP, *zero(stage, "host")) for stage in (1, 3)}
    part(0, {**quick, **SKIPPING, **mup}, 2)
    part(1, {"plain": (), "mup-plain": MUP, "distill-plain": distill, **ALONE}, 1)
    part(2, {}, 2)
    return shown


def apart(seen: Seen, expected: Seen, key: str) -> float:
    """Return the largest difference of two lists of numbers; a NaN belongs beside a NaN."""
    pairs = list(zip(seen[key], expected[key], strict=True))
    assert len(pairs) == 12, seen["said"]
    assert all((one is None) == (other is None) for one, other in pairs)
    return max(abs(one - other) for one, other in pairs if one is not None)


@pytest.mark.parametrize("name", [*QUICK, *ALONE])
def test_losses_and_norms_are_those_of_one_plain_process(name: str, shown: Shown) -> None:
    assert apart(shown[name], shown["plain"], "losses") < LIMIT
    assert apart(shown[name], shown["plain"], "norms") < LIMIT


@pytest.mark.long
def test_so_they_are_in_all_stages_homes_and_passes(
    shown: Shown, corpus: Sequence[str], tmp_path: Path
) -> None:
    for name, seen in made(PARITY, tmp_path, corpus).items():
        assert apart(seen, shown["plain"], "losses") < LIMIT, name
        assert apart(seen, shown["plain"], "norms") < LIMIT, name


@pytest.mark.long
def test_a_loss_with_a_gradient_in_it_is_learnt_by_stages_1_and_2(
    corpus: Sequence[str], tmp_path: Path
) -> None:
    [expected] = made({"energy-plain": ENERGY}, tmp_path, corpus, ranks=1).values()
    stages = {f"energy-zero{stage}": (*ENERGY, *zero(stage, "host", 3)) for stage in (1, 2)}
    for name, seen in made(stages, tmp_path, corpus).items():
        assert apart(seen, expected, "losses") < LIMIT, name


@pytest.mark.parametrize("name", [name for name in SKIPPING if "zero" in name])
def test_a_step_that_is_left_out_leaves_nothing_behind(name: str, shown: Shown) -> None:
    kind, step = ("nan", 7) if name.startswith("nan") else ("spike", 9)
    expected = shown[f"{kind}-fsdp2"]
    assert shown[name]["skipped"] == expected["skipped"] == [step]
    losses = [seen["losses"] for seen in (shown[name], expected)]
    for number, (one, other) in enumerate(zip(*losses, strict=True), start=1):
        assert one == pytest.approx(other, rel=0, abs=LIMIT, nan_ok=True), number
    assert not math.isclose(expected["losses"][-1], shown["plain"]["losses"][-1], abs_tol=1e-3)


@pytest.mark.parametrize("name", ["move-a", "move-b", "move-c"])
def test_a_run_moves_between_engines_and_numbers_of_ranks(name: str, shown: Shown) -> None:
    first, second, third = shown.parts[name]
    assert [len(seen["losses"]) for seen in (first, second, third)] == [5, 10, 12]
    for step, seen in ((5, second), (10, third)):
        assert f"resumed from the checkpoint of step {step}" in seen["said"]
        assert seen["digests"] == [stored_digest(shown.folder / name, step)]
    assert apart(third, shown["plain"], "losses") < LIMIT


@pytest.mark.parametrize("name", ["distill-move-b", "distill-move-c"])
def test_frozen_weights_move_too(name: str, shown: Shown) -> None:
    _, second, third = shown.parts[name]
    for step, seen in ((5, second), (10, third)):
        assert seen["digests"] == [stored_digest(shown.folder / name, step)]
    assert apart(third, shown["distill-plain"], "losses") < LIMIT


@pytest.mark.parametrize("stage", [1, 3])
def test_rates_of_mup_are_those_of_each_tensor(stage: int, shown: Shown) -> None:
    assert apart(shown[f"mup-zero{stage}"], shown["mup-plain"], "losses") < LIMIT


def test_a_run_folder_says_what_deepspeed_was_given(shown: Shown) -> None:
    def given(name: str) -> dict[str, Any]:
        text = (shown.folder / name / "deepspeed.json").read_text(encoding="utf-8")
        return json.loads(text)

    own = given("zero3-host-3")
    assert own["zero_optimization"]["stage"] == 3
    assert own["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (own["train_batch_size"], own["gradient_accumulation_steps"]) == (12, 3)
    assert own["train_micro_batch_size_per_gpu"] == 2
    # Of a run that has moved, the newest.
    assert given("move-a")["zero_optimization"]["stage"] == 1
    assert not (shown.folder / "plain" / "deepspeed.json").exists()
