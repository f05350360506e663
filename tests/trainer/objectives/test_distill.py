"""A student's losses are those of the paper, its frozen part stays, and its run resumes exactly."""

import gc
import json
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from foreign_cases import saved
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from interlace.launch.cli import main
from interlace.trainer.config.distill_section import DistillSection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import DataSection, RunConfig, RunSection, TrainSection
from interlace.trainer.conformance.live_memory import LiveTensors
from interlace.trainer.model_folder import write_model_folder
from interlace.trainer.models import cost
from interlace.trainer.models.context import BlockContext
from interlace.trainer.models.distilled_head import DistilledHead, HeadInputs, HeadWeights
from interlace.trainer.models.language_model import LanguageModel, rotary_in
from interlace.trainer.models.student import Lesson, Student, replaced_layers, teach
from interlace.trainer.objectives.distill import Distill
from interlace.trainer.saved_model import load_saved_model

HYBRID = ModelSection(
    width=32,
    heads=2,
    pattern="MF AF MF",
    layers=1,
    ffn_width=48,
    mamba_head_width=16,
    mamba_state_width=16,
    mamba_groups=2,
    mamba_expand=1.0,
)
TEACHER = HYBRID.model_copy(update={"pattern": "AF", "layers": 3})
TOKENS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))
SEGMENTS = (torch.arange(20) >= 8).long().expand(3, -1)
POSITIONS = torch.cat([torch.arange(8), torch.arange(12)]).expand(3, -1)
Reduction = Literal["mean", "sum"]


def pair(settings: DistillSection) -> tuple[Student, LanguageModel]:
    """A student and a teacher in fp64, with weights that have nothing to do with each other."""
    student = Student(HYBRID, 97, torch.float64, settings)
    teacher = LanguageModel(TEACHER, 97, torch.float64)
    student.initialise(1)
    teacher.initialise(2)
    return student.double(), teacher.double().eval()


def lesson_for(teacher: LanguageModel) -> Lesson:
    return teach(teacher, TOKENS, SEGMENTS, POSITIONS, (0, 2))


def plain_losses(
    student: Student, teacher: LanguageModel, settings: DistillSection
) -> dict[str, torch.Tensor]:
    """A twin that keeps everything: every layer by itself, all logits at once."""
    context = BlockContext(rotary_in(torch.float64, POSITIONS, TEACHER), SEGMENTS)
    states = [functional.embedding(TOKENS, teacher.embedding.weight)]
    for layer in teacher.layers:
        states.append(layer(states[-1], context)[0])
    theirs = teacher.norm(states[-1]) @ teacher.head_weight().T
    x = functional.embedding(TOKENS, student.embedding.weight)
    distances: list[torch.Tensor] = []
    for number, layer in enumerate(student.layers):
        x = layer(x, context)[0]
        if number != 1:
            answer = layer(states[number].detach(), context)[0]
            distances.append((answer - states[number + 1].detach()).square())
    ours = student.norm(x) @ student.head_weight().T
    heat = settings.temperature
    p, q = (theirs.detach() / heat).softmax(-1), (ours / heat).softmax(-1)
    divergence = heat**2 * (p * (p / q).log()).sum()
    nll = -ours.log_softmax(-1).gather(-1, TOKENS[..., None]).mean()
    if settings.reduction == "sum":
        distance = sum((each.sum().sqrt() for each in distances), torch.zeros(()))
        return {"distance": distance, "divergence": divergence / 3, "nll": nll}
    distance = torch.stack([each.mean(-1).sqrt().mean() for each in distances]).mean()
    return {"distance": distance, "divergence": divergence / 60, "nll": nll}


@pytest.mark.parametrize("heat", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_and_gradients_are_those_of_a_twin_that_keeps_everything(
    reduction: Reduction, heat: float
) -> None:
    settings = DistillSection(
        hidden_weight=0.7,
        logit_weight=0.4,
        likelihood_weight=0.2,
        temperature=heat,
        reduction=reduction,
    )
    student, teacher = pair(settings)
    lesson = lesson_for(teacher)
    found = student(TOKENS, TOKENS, segments=SEGMENTS, positions=POSITIONS, lesson=lesson)
    expected = plain_losses(student, teacher, settings)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.details["distance"], expected["distance"].detach(), **close)
    torch.testing.assert_close(
        found.details["divergence"], expected["divergence"].detach(), **close
    )
    torch.testing.assert_close(found.mean_nll, expected["nll"].detach(), **close)
    total = 0.7 * expected["distance"] + 0.4 * expected["divergence"] + 0.2 * expected["nll"]
    torch.testing.assert_close(found.objective, total, **close)
    names, parameters = zip(*student.named_parameters(), strict=True)
    wanted = torch.autograd.grad(total, parameters)
    ours = torch.autograd.grad(found.objective, parameters)
    for name, one, other in zip(names, ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=name)


def test_the_head_s_gradients_do_not_depend_on_how_tokens_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (11, 5), (7, 6), (11, 6))
    hidden, weight, taught, head = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=number < 2)
        for number, shape in enumerate(shapes)
    )
    targets = torch.tensor([0, 3, 10, 4, 4, 9, 1])
    weights = HeadWeights(divergence=0.3, likelihood=0.5, temperature=1.7)

    def objective(rows: int, *inputs: torch.Tensor) -> torch.Tensor:
        given = HeadInputs(*inputs, taught, head, targets)
        return DistilledHead.apply(*given, weights, rows)[0]

    for rows in (1, 3, 100):
        assert torch.autograd.gradcheck(partial(objective, rows), (hidden, weight))
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(objective(3, hidden, weight), hidden, create_graph=True)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    settings = DistillSection(train_only="all")
    teacher = LanguageModel(HYBRID, 97, torch.float64)
    teacher.initialise(1)
    student = Student(HYBRID, 97, torch.float64, settings)
    student.load_state_dict(teacher.double().state_dict())
    lesson = teach(teacher, TOKENS, SEGMENTS, POSITIONS, (0, 2))
    loss = student.double()(TOKENS, TOKENS, segments=SEGMENTS, positions=POSITIONS, lesson=lesson)
    assert float(loss.objective.detach()) == pytest.approx(0.0, abs=1e-12)
    loss.objective.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


def test_without_a_lesson_a_student_is_a_language_model() -> None:
    student, _ = pair(DistillSection())
    plain = LanguageModel(HYBRID, 97, torch.float64)
    plain.load_state_dict(student.state_dict())
    losses = [each(TOKENS, TOKENS).objective for each in (student, plain.double())]
    assert torch.equal(*losses)


def test_from_layers_alone_nothing_else_is_differentiated() -> None:
    student, teacher = pair(DistillSection(logit_weight=0.0))
    loss = student(
        TOKENS, TOKENS, segments=SEGMENTS, positions=POSITIONS, lesson=lesson_for(teacher)
    )
    loss.objective.backward()
    touched = {
        name.split(".blocks")[0]
        for name, parameter in student.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    assert touched == {"layers.0", "layers.2"}
    before = ("embedding", "layers.1")
    assert all(p.grad is None for name, p in student.named_parameters() if name.startswith(before))


def test_layers_that_cannot_be_compared_are_told() -> None:
    assert replaced_layers(HYBRID, TEACHER) == {0: (0,), 2: (0,)}
    longer = TEACHER.model_copy(update={"layers": 4})
    with pytest.raises(ValueError, match="its layers are AF AF AF AF, and this recipe's MF AF MF"):
        replaced_layers(HYBRID, longer)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a teacher of three layers of attention, and a student beside it."""
    root = tmp_path_factory.mktemp("teacher")
    model = saved(TEACHER, root / "run")
    (root / "model").mkdir()
    config = model.config.model_copy(update={"data": DataSection(sequence_length=32)})
    weights = model.model.state_dict()
    write_model_folder(weights, config, model.tokenizer, root / "model", description="a teacher")
    words = ["hybridize", str(root / "model"), "--keep-attention", "every=2"]
    assert main([*words, "--to", str(root / "student")]) == 0
    return root / "model"


def recipe(teacher: Path, **distill: Any) -> RunConfig:
    settings = DistillSection(teacher=str(teacher), **distill)
    data, train = DataSection(sequence_length=32), TrainSection(objective="distill")
    run = RunSection(start_from=str(teacher.parent / "student"))
    return RunConfig(run=run, model=HYBRID, data=data, train=train, distill=settings)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nobody": (
        {"distill": DistillSection()},
        "distill.teacher is not set: there is nobody to learn from; type its folder",
    ),
    "width": (
        {"model": HYBRID.model_copy(update={"width": 64})},
        "model.width=64: distill.teacher={} is 32 wide, and its layers can be imitated at that "
        "width only; type model.width=32",
    ),
    "layers": (
        {"model": TEACHER.model_copy(update={"layers": 2})},
        "model.pattern=AF: does not go with distill.teacher={}: its layers are AF AF AF, and this "
        "recipe's AF AF",
    ),
    "nothing new": (
        {"model": TEACHER},
        "distill.train_only=new: distill.teacher={} has every layer of this recipe, so nothing "
        "would be trained; type distill.train_only=all",
    ),
    "frozen at random": (
        {"run": RunSection()},
        "distill.train_only=new: leaves what the teacher has too as it starts, which without "
        "run.start_from is at random; type run.start_from= and the folder that `interlace "
        "hybridize` made, or distill.train_only=all",
    ),
    "z-loss": (
        {"train": TrainSection(objective="distill", z_loss=1e-4)},
        "train.z_loss=0.0001: the distill objective has none; type train.z_loss=0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_told(name: str, teacher_folder: Path) -> None:
    changes, message = WRONG[name]
    config = recipe(teacher_folder).model_copy(update=changes)
    assert Distill.problems(config) == [message.format(teacher_folder)]


def test_a_teacher_that_is_not_there_and_weights_of_zero_are_told(tmp_path: Path) -> None:
    nothing = {"hidden_weight": 0.0, "logit_weight": 0.0}
    first, second = Distill.problems(recipe(tmp_path / "gone", **nothing))
    assert first.startswith("distill.hidden_weight=0: and all other weights are 0")
    assert f"distill.teacher={tmp_path / 'gone'}: there is no such folder" in second


def trainable(student: Student, train_only: str) -> None:
    """Freeze what `freeze` would."""
    for name, parameter in student.named_parameters():
        new = name.startswith(("layers.0.blocks.0.mixer", "layers.2.blocks.0.mixer"))
        parameter.requires_grad_(train_only == "all" or new)


def alive_bytes(config: RunConfig, rows: int) -> int:
    student = Student(HYBRID, 257, settings=config.distill)
    teacher = LanguageModel(TEACHER, 257)
    for model in (student, teacher):
        model.initialise(0)
    teacher.requires_grad_(False)
    trainable(student, config.distill.train_only)
    tokens, positions = torch.zeros(rows, 64, dtype=torch.int64), torch.arange(64).expand(rows, -1)
    with LiveTensors() as tensors:
        lesson = teach(teacher, tokens, tokens, positions, (0, 2))
        loss = student(tokens, tokens, segments=tokens, positions=positions, lesson=lesson)
    gc.collect()
    alive = tensors.bytes()
    assert loss.objective.requires_grad
    return alive


@pytest.mark.parametrize(("train_only", "spare"), [("all", 0.0), ("new", 0.11)])
def test_activations_are_those_that_stay_alive(
    train_only: str, spare: float, teacher_folder: Path
) -> None:
    config = recipe(teacher_folder, train_only=train_only)
    measured = alive_bytes(config, 3) - alive_bytes(config, 1)
    forward = cost.ForwardPass(
        tokens=2 * 64, sequence_length=64, bytes_per_element=4, checkpointing="none"
    )
    planned = Distill.activation_bytes(config, 257, forward)
    kept = planned - 4 * cost.logits_bytes(257, forward)
    # What frozen blocks do not keep is not taken off.
    assert kept == pytest.approx((1 + spare) * measured, rel=0.02)


@pytest.mark.parametrize("train_only", ["new", "all"])
def test_costs_are_those_of_both_models(train_only: str, teacher_folder: Path) -> None:
    config = recipe(teacher_folder, train_only=train_only)
    # Its products are counted as such on every machine.
    counting = {"attention_backend": "reference"}
    student = Student(HYBRID.model_copy(update=counting), 257, settings=config.distill)
    teacher = LanguageModel(TEACHER.model_copy(update=counting), 257)
    for model in (student, teacher):
        model.initialise(0)
    teacher.requires_grad_(False)
    trainable(student, train_only)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert Distill.parameter_count(config, 257) == trained
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        lesson = teach(teacher, tokens, None, None, (0, 2))
        student(tokens, tokens, lesson=lesson).objective.backward()
    expected = Distill.flops_per_token(config, 257)
    # The plan counts the gradient of the first trained layer's input too, which nobody needs.
    measured = counted.get_total_flops() / 64
    assert expected.forward + expected.backward == pytest.approx(measured, rel=0.04)
    whole = cost.parameter_count(TEACHER, 257) + cost.parameter_count(HYBRID, 257)
    assert Distill.untrained_bytes(config, 257, 1, 2) == 2 * (whole - trained)


def words(student: Path, run: Path, corpus: Sequence[str]) -> list[str]:
    return [
        str(student / "recipe.toml"),
        *corpus,
        f"run.dir={run}",
        "train.steps=8",
        "train.tokens_per_step=256",
        "train.microbatch_rows=4",
        "train.validation_tokens=512",
        "checkpoint.every_steps=3",
        "optimizer.warmup_steps=2",
        "observe.sample_tokens=0",
        "train.validate_every_steps=0",
    ]


@pytest.mark.long
def test_a_killed_run_ends_as_it_would_have_and_only_new_layers_have_changed(
    interlace: Callable[..., Any],
    corpus: tuple[str, str],
    teacher_folder: Path,
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    student = teacher_folder.parent / "student"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = interlace("train", *words(student, straight, corpus))
    assert done.returncode == 0, done.stderr
    assert f"weights of {student} (step 0)" in done.stdout
    kill = {"INTERLACE_FAILPOINT": "step.backward@11:kill"}
    done = interlace("train", *words(student, broken, corpus), environment=kill)
    assert done.returncode == -signal.SIGKILL
    done = interlace("train", "--resume", str(broken))
    assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step 3" in done.stdout
    assert len(losses_of(straight)) == 8
    assert losses_of(broken) == losses_of(straight)
    records = [json.loads(line) for line in (straight / "metrics.jsonl").open(encoding="utf-8")]
    assert records[-1]["distance"] < records[0]["distance"]
    assert {"distance", "divergence"} <= records[0].keys()
    before = load_file(student / "model.safetensors")
    after, again = (load_saved_model(run).model.state_dict() for run in (straight, broken))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".0.mixer." in name and "layers.1" not in name}
    assert all(torch.equal(after[name], again[name]) for name in after)


@pytest.mark.long
def test_two_ranks_learn_what_one_does_and_another_teacher_is_noticed(
    interlace: Callable[..., Any],
    corpus: tuple[str, str],
    teacher_folder: Path,
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    student = teacher_folder.parent / "student"
    found: list[list[float]] = []
    for ranks in (1, 2):
        line = [*words(student, tmp_path / str(ranks), corpus), "train.steps=4"]
        done = interlace("train", *line, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append([float.fromhex(loss) for loss in losses_of(tmp_path / str(ranks))])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    other = tmp_path / "other"
    other.mkdir()
    model = load_saved_model(teacher_folder)
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    weights["norm.weight"][0] += 1e-3
    write_model_folder(weights, model.config, model.tokenizer, other, description="another")
    done = interlace("train", "--resume", str(tmp_path / "1"), f"distill.teacher={other}")
    assert done.returncode == 2
    assert done.stderr == (
        f"interlace: distill.teacher={other}: its weights are not those this run was started with; "
        "restore them, or start a new run\n"
    )
