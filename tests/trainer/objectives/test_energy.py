"""Runs of the energy objective: the same run when killed, offloaded, or on two ranks."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from interlace.kernels.update import SGD
from interlace.trainer.batches import Batch
from interlace.trainer.config import load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.loop import train
from interlace.trainer.objectives.energy import Energy, drawn_steps
from interlace.trainer.optimizer import parameter_groups, set_learning_rate
from interlace.trainer.world import World

Interlace = Callable[..., Any]

S1 = (
    "train.objective=energy",
    "train.steps=8",
    "checkpoint.every_steps=3",
    "energy.step_size=5",
    # Adam makes a whole step of a gradient that is nothing but rounding; here of a short one.
    "optimizer.peak_lr=1e-4",
)
S2 = (
    *S1,
    # Published steps are long for weights that have learnt nothing, and magnify every difference.
    "optimizer.peak_lr=1e-6",
    "energy.step_size=0.5",
    "energy.steps=1",
    "energy.fewest_last_steps=2",
    "energy.most_last_steps=3",
    "energy.learn_step_size=false",
    "energy.step_size_spread=2.0",
    "energy.langevin_noise=3.0",
    "energy.detach=false",
    "energy.loss_steps=last",
    "energy.truncate=true",
    "energy.replay_rows=10",
)
RECIPES = pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(each, id=name, marks=pytest.mark.long)
        for name, each in (("S1", S1), ("S2", S2))
    ],
)


@pytest.fixture(scope="module")
def straight(
    tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], Path]:
    """The undisturbed run of a recipe in this process; made once each."""
    runs: dict[tuple[str, ...], Path] = {}

    def run_of(recipe: Sequence[str]) -> Path:
        key = tuple(recipe)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("straight") / "run"
            words = [*tiny[1:], *recipe, f"run.dir={runs[key]}"]
            outcome = train(load_recipe(tiny[0], words).config, World())
            assert outcome.finished
        return runs[key]

    return run_of


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@RECIPES
def test_a_killed_run_goes_on_with_the_same_losses_to_the_last_bit(
    recipe: tuple[str, ...],
    straight: Callable[[Sequence[str]], Path],
    interlace: Interlace,
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    kill = {"INTERLACE_FAILPOINT": "step.backward@6:kill"}
    done = interlace("train", *tiny, *recipe, f"run.dir={run}", environment=kill)
    assert done.returncode == -signal.SIGKILL
    done = interlace("train", "--resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from the checkpoint of step 3" in done.stdout
    assert losses_of(run) == losses_of(straight(recipe))


@RECIPES
def test_two_ranks_have_the_run_of_one(
    recipe: tuple[str, ...],
    straight: Callable[[Sequence[str]], Path],
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    done = interlace("train", *tiny, *recipe, f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    both = list(zip(records(straight(recipe)), records(run), strict=True))
    # Later the descents of S2 magnify what two orders of summation differ by beyond the bound.
    for one, two in both[:5]:
        for name in ("loss", "grad_norm", "energy_gap", "inner_gradient_norm", "loss_step_2"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


@pytest.mark.parametrize("recipe", [S1, S2], ids=["S1", "S2"])
def test_offloading_changes_no_bit(
    recipe: tuple[str, ...],
    straight: Callable[[Sequence[str]], Path],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    words = [*tiny[1:], *recipe, f"run.dir={tmp_path / 'run'}"]
    words += ["offload.strategy=host", "offload.subgroup_elements=3000"]
    train(load_recipe(tiny[0], words).config, World())
    assert losses_of(tmp_path / "run") == losses_of(straight(recipe))


def config_of(**energy: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "train": {"objective": "energy", "tokens_per_step": 64},
            "model": {"width": 32, "heads": 2, "layers": 1},
            "data": {"sequence_length": 8},
            "energy": {"step_size": 5.0, **energy},
        }
    )


VOCABULARY = 11


def objective_of(config: RunConfig) -> Energy:
    plan: Any = SimpleNamespace(rows_per_step=8, sequence_length=8, vocabulary_size=VOCABULARY)
    return Energy(config, plan, World())


def batch_of(step: int, rows: range = range(8)) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + 7)
    tokens = torch.randint(0, VOCABULARY, (8, 9), generator=generator)[rows.start : rows.stop]
    segments = torch.zeros(len(rows), 8, dtype=torch.int64)
    positions = torch.arange(8).expand(len(rows), -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, step, rows)


def model_of(config: RunConfig, dtype: torch.dtype = torch.float32) -> Any:
    model = Energy.build(config, VOCABULARY, dtype).to(dtype)
    model.initialise(0)
    return model


REPLAYING = {"replay_rows": 12, "langevin_noise": 1.0, "step_size_spread": 2.0}


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_losses_and_gradients_of_a_step_do_not_depend_on_how_its_rows_are_cut(cut: int) -> None:
    config = config_of(**REPLAYING)
    found: list[list[torch.Tensor]] = []
    for parts in (1, cut):
        objective, model = objective_of(config), model_of(config, torch.float64)
        size = 8 // parts
        for step in range(3):
            model.zero_grad()
            batches = [batch_of(step, range(n, n + size)) for n in range(0, 8, size)]
            losses = [objective.loss(model, batch) for batch in batches]
            (sum(loss.objective for loss in losses) / parts).backward()
        mean = torch.stack([loss.mean_nll for loss in losses]).mean()
        found.append([mean, *(weight.grad for weight in model.parameters())])
    # The buffer rounds to fp32.
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


SHARDED = """
import torch
from interlace.trainer.batches import Batch
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.objectives.energy import Energy
from interlace.trainer.parallel import cast_weights, shard
from interlace.trainer.plan import Plan
from interlace.trainer.world import World, process_group

config = RunConfig.model_validate(
    {
        "train": {"objective": "energy", "tokens_per_step": 64},
        "model": {"width": 32, "heads": 2, "layers": 1},
        "data": {"sequence_length": 8, "respect_documents": False},
        "energy": {"step_size": 5.0},
    }
)
plan = Plan.model_construct(rows_per_step=8, sequence_length=8, vocabulary_size=11)
tokens = torch.arange(27).reshape(3, 9) % 11
batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, 0, range(3))
with process_group() as world:
    found = []
    for many in (World(), world):
        model = Energy.build(config, 11, torch.bfloat16)
        cast_weights(model, torch.bfloat16)
        shard(model, model.units, many, 1, torch.bfloat16)
        model.initialise(0)
        found.append(float(Energy(config, plan, many).loss(model, batch).objective.detach()))
assert found[0] == found[1], found
"""


def test_sharding_does_not_round_what_a_row_weighs(tmp_path: Path) -> None:
    done = run_on_ranks(SHARDED, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_replayed_row_goes_on_where_it_ended() -> None:
    config = config_of(replay_rows=4)
    objective, model = objective_of(config), model_of(config)
    first, second = batch_of(0), batch_of(1)
    objective.loss(model, first)
    assert objective.buffer is not None
    kept = {name: tensor.clone() for name, tensor in objective.buffer.kept.items()}
    replayed, rows = objective.buffer.replayed(second, seed=0)
    assert rows == [1, 3, 5, 7]
    assert torch.equal(replayed["tokens"], first.tokens[1::2])
    assert torch.equal(replayed["logits"], kept["logits"][0])
    again = objective.draws(second, rows, replayed["logits"]).start(8, VOCABULARY)
    assert torch.equal(again[8:], kept["logits"][0])
    # The replayed rows count, and they are not what is reported.
    alone = objective_of(config_of()).loss(model, second)
    both = objective.loss(model, second)
    assert torch.equal(both.mean_nll, alone.mean_nll)
    assert not torch.equal(both.objective, alone.objective)


def test_validation_is_the_same_every_time_and_takes_most_steps() -> None:
    config = config_of(steps=1, most_last_steps=4, langevin_noise=1.0, step_size_spread=3.0)
    objective, model = objective_of(config), model_of(config)
    batch = batch_of(-1)
    with torch.no_grad():
        losses = [float(objective.held_out_nll(model, batch)) for _ in range(2)]
    assert losses[0] == losses[1]
    draws = objective.draws(batch, [], None)
    assert list(draws.landscapes) == [0, 0, 0, 0]
    assert draws.rates(torch.tensor([5.0]), 8).flatten().tolist() == [5.0]


def test_the_number_of_last_steps_is_drawn_evenly_from_its_range() -> None:
    settings = config_of(fewest_last_steps=2, most_last_steps=4).energy
    drawn = [drawn_steps(settings, f"0/{step}/steps") for step in range(300)]
    assert {drawn.count(number) > 70 for number in (2, 3, 4)} == {True}
    assert set(drawn) == {2, 3, 4}


def test_step_sizes_are_drawn_evenly_between_the_bounds_for_every_position() -> None:
    config = config_of(step_size_spread=2.0, step_size=4.0)
    draws = objective_of(config).draws(batch_of(3), [], None)
    rates = draws.rates(torch.tensor([4.0]), 1000)
    assert rates.shape == (8, 1000, 1)
    assert 2.0 <= float(rates.min()) < 2.01
    assert 7.99 < float(rates.max()) <= 8.0
    assert float(rates.mean()) == pytest.approx(5.0, abs=0.1)
    learnt_away = torch.tensor([-1.0])
    floor = objective_of(config_of()).draws(batch_of(0), [], None).rates(learnt_away, 1)
    assert float(floor) == pytest.approx(1e-4)


def test_rows_and_steps_and_seeds_draw_differently() -> None:
    objective = objective_of(config_of())
    starts = [objective.draws(batch_of(step), [], None).start(8, VOCABULARY) for step in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert len({float(row.sum()) for row in starts[0]}) == 8
    objective.seed = 1
    other = objective.draws(batch_of(0), [], None).start(8, VOCABULARY)
    assert not torch.equal(other, starts[0])


def test_the_objective_is_the_mean_over_steps_and_the_report_the_last_step() -> None:
    config = config_of(steps=3)
    loss = objective_of(config).loss(model_of(config), batch_of(0))
    steps = [float(loss.details[f"loss_step_{n}"]) for n in (1, 2, 3)]
    assert float(loss.objective.detach()) == pytest.approx(sum(steps) / 3)
    assert float(loss.mean_nll) == steps[-1]
    assert {"energy_gap", "inner_gradient_norm", "step_size"} < set(loss.details)
    assert float(loss.details["step_size"]) == 5.0


def test_the_learnt_step_size_has_a_rate_of_its_own_and_no_decay() -> None:
    config = config_of(step_size_lr_factor=7.0)
    model = model_of(config)
    groups = parameter_groups(model, SGD(lr=1.0, weight_decay=0.1).hyperparameters())
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.5)
    [own] = [group for group in optimizer.param_groups if model.step_size in set(group["params"])]
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (3.5, 0.0, 1)
    assert {group["lr"] for group in optimizer.param_groups if group is not own} == {0.5}
    count = sum(len(group["params"]) for group in groups)  # type: ignore[arg-type]
    assert count == len(list(model.parameters()))
    fixed = model_of(config_of(learn_step_size=False))
    assert "step_size" in dict(fixed.named_buffers())
    assert fixed.rate_factors == {}


REFUSED = {
    "model.pattern": (
        {"model": {"pattern": "AM"}},
        "model.pattern=AM: train.objective=energy has no candidate path and no second derivative "
        "for M (mamba2); type a model.pattern of A (attention) and F (swiglu) blocks, such as "
        "model.pattern=AF",
    ),
    "no attention": (
        {"model": {"pattern": "F"}},
        "model.pattern=F: without attention a candidate sees no context; type model.pattern=AF",
    ),
    "kernels": (
        {"model": {"attention_backend": "flex"}},
        "model.attention_backend=flex: has no second derivative, which train.objective=energy "
        "needs; type model.attention_backend=auto",
    ),
    "formula": (
        {"model": {"attention_backend": "reference"}},
        "model.attention_backend=reference: torch's softmax has no derivative of its tangent, "
        "which energy.inner_step=graph_free needs; type model.attention_backend=chunked or "
        "energy.inner_step=plain",
    ),
    "range": (
        {"energy": {"fewest_last_steps": 3, "most_last_steps": 2}},
        "energy.fewest_last_steps=3: is more than energy.most_last_steps=2; type "
        "energy.most_last_steps=3",
    ),
    "truncated": (
        {"energy": {"truncate": True}},
        "energy.truncate=true: leaves only the last step a gradient, and energy.loss_steps=every "
        "would train those before it; type energy.loss_steps=last",
    ),
    "no share": (
        {"energy": {"replay_rows": 4, "replay_share": 0.1}},
        "energy.replay_share=0.1: is less than one of the 8 rows of a step, so nothing would be "
        "replayed; type energy.replay_share=0.125 or energy.replay_rows=0",
    ),
    "short buffer": (
        {"energy": {"replay_rows": 3}},
        "energy.replay_rows=3: is less than the 4 rows that a step replays; type "
        "energy.replay_rows=4 or lower energy.replay_share",
    ),
    "tied": (
        {"model": {"tie_embeddings": True}},
        "model.tie_embeddings=true: an energy model has no output head to tie; type "
        "energy.candidate_table=tokens to share the token embeddings with candidates",
    ),
    "z-loss": (
        {"train": {"z_loss": 0.1}},
        "train.z_loss=0.1: candidates are normalised at every step, so their partition is not "
        "trained; type train.z_loss=0",
    ),
    "selective": (
        {
            "train": {"activation_checkpointing": "selective"},
            "energy": {"inner_step": "plain"},
        },
        "train.activation_checkpointing=selective: keeps results for one backward pass, and "
        "energy.inner_step=plain takes two; type train.activation_checkpointing=block or "
        "energy.inner_step=graph_free",
    ),
    "compiled": (
        {"train": {"compile": True}},
        "train.compile=true: compiled layers have no second derivative; type train.compile=false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_energy_model_cannot_do_is_refused_with_what_to_type(name: str) -> None:
    changes, message = REFUSED[name]
    tables = config_of().model_dump()
    for section, settings in changes.items():
        tables[section] |= settings
    assert Energy.problems(RunConfig.model_validate(tables)) == [message]


@pytest.mark.parametrize("recipe", [S1, S2], ids=["S1", "S2"])
def test_both_published_recipes_are_accepted(recipe: tuple[str, ...], tiny: Sequence[str]) -> None:
    assert Energy.problems(load_recipe(tiny[0], [*tiny[1:], *recipe]).config) == []
