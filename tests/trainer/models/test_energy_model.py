"""The energy model against its published form written out, and what its candidates may see."""

import gc
from typing import Any

import pytest
import torch
from energy_cases import (
    SETTINGS,
    SHAPES,
    VOCABULARY,
    Concatenated,
    build,
    draws_of,
    flop_counter,
    rows_of,
)

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.conformance.live_memory import LiveTensors
from interlace.trainer.models.energy.model import EnergyModel, Past
from interlace.trainer.models.model import Model
from interlace.trainer.sampling import SamplingSettings, generate

INNER_STEPS = pytest.mark.parametrize("inner", ["graph_free", "plain"])


def gradients_of(model: Model, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(objective, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(named.items(), found, strict=True)
    }


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest distance between gradients of a parameter, relative to their length."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - each).norm() / (each.norm() + 1e-9)) for name, each in expected.items()
    )


def past_of(model: EnergyModel, rows: dict[str, torch.Tensor]) -> Past:
    return model.observe(rows["tokens"], rows["segments"], rows["positions"])


def candidates(seed: int = 0, count: int = 3, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, length, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


CASES = [(shape, "S1") for shape in SHAPES] + [
    ("grouped", name) for name in SETTINGS if name != "S1"
]


@INNER_STEPS
@pytest.mark.parametrize(("shape", "settings"), CASES)
def test_loss_and_gradients_are_those_of_the_concatenated_form(
    shape: str, settings: str, inner: str
) -> None:
    energy = SETTINGS[settings].model_copy(update={"inner_step": inner})
    model, rows, draws = build(SHAPES[shape], energy), rows_of(), draws_of(energy)
    found = model(rows["tokens"], rows["targets"], draws, **documents(rows))
    expected = Concatenated(model).loss(rows, draws)
    torch.testing.assert_close(found.objective, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = gradients_of(model, found.objective), gradients_of(model, expected)
    assert sum(float(each.norm()) > 0 for each in theirs.values()) > len(theirs) - 2
    assert furthest(ours, theirs) < 1e-9


def documents(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"segments": rows["segments"], "positions": rows["positions"]}


DISTANCE = 2e-6


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_is_that_of_finite_differences(settings: str) -> None:
    # A start that is detached later is a constant: differences see through it, gradients do not.
    energy = SETTINGS[settings].model_copy(update={"detach": False, "truncate": False})
    model, rows, draws = build(SHAPES["grouped"], energy), rows_of(), draws_of(energy)

    def loss() -> torch.Tensor:
        return model(rows["tokens"], rows["targets"], draws, **documents(rows)).objective

    gradients = gradients_of(model, loss())
    generator = torch.Generator().manual_seed(2)
    moves = {
        name: torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        for name, weight in model.named_parameters()
    }
    # Two distances, so that what is left of the difference is of fourth order.
    values: dict[int, float] = {}
    for steps, further in ((1, 1), (2, 1), (-1, -3), (-2, -1)):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(moves[name], alpha=further * DISTANCE)
        values[steps] = float(loss().detach())
    near, far = values[1] - values[-1], values[2] - values[-2]
    measured = (8 * near - far) / (12 * DISTANCE)
    expected = sum(float((gradients[name] * move).sum()) for name, move in moves.items())
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_without_a_graph_has_the_derivative_of_one_with(
    settings: str, dtype: torch.dtype, tolerance: float
) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for inner in ("graph_free", "plain"):
        energy = SETTINGS[settings].model_copy(update={"inner_step": inner})
        model, rows = build(SHAPES["grouped"], energy, dtype), rows_of()
        result = model(rows["tokens"], rows["targets"], draws_of(energy), **documents(rows))
        found.append(gradients_of(model, result.objective))
    # Per parameter, but not below what the whole gradient rounds to.
    whole = torch.cat([each.flatten() for each in found[1].values()]).norm()
    for name, expected in found[1].items():
        distance = (found[0][name] - expected).norm()
        assert float(distance / (expected.norm() + 0.01 * whole)) < tolerance, name


def test_two_streams_take_at_most_60_percent_of_the_concatenated_form_s_products() -> None:
    energy = EnergySection(step_size=5.0, inner_step="plain")
    model, rows, draws = build(SHAPES["plain"], energy), rows_of(2, 64), draws_of(energy, 2)
    counts: list[int] = []
    for loss in (
        lambda: model(rows["tokens"], rows["targets"], draws, **documents(rows)).objective,
        lambda: Concatenated(model).loss(rows, draws),
    ):
        with flop_counter() as counter:
            loss().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] < 0.6


@pytest.mark.parametrize("changed", [0, 4, 5, 11])
def test_a_token_reaches_no_candidate_before_it_and_none_of_another_document(changed: int) -> None:
    model, rows = build(SHAPES["grouped"], SETTINGS["S1"]), rows_of()
    before = model.energies(candidates(), past_of(model, rows), 1)
    rows["tokens"] = rows["tokens"].clone()
    rows["tokens"][:, changed] += 1
    rows["tokens"] %= VOCABULARY
    after = model.energies(candidates(), past_of(model, rows), 1)
    assert torch.equal(after[:, :changed], before[:, :changed])
    reached = after != before
    same = rows["segments"] == rows["segments"][:, changed : changed + 1]
    assert torch.equal(reached[:, changed:], same[:, changed:])


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_a_candidate_reaches_no_other(changed: int) -> None:
    model, rows = build(SHAPES["mixed"], SETTINGS["adaLN"]), rows_of()
    past, first, second = past_of(model, rows), candidates(0), candidates(0)
    second[1, changed] = candidates(1)[1, changed]
    moved = model.energies(second, past, 0) != model.energies(first, past, 0)
    assert moved.nonzero().tolist() == [[1, changed]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_s_descent_does_not_depend_on_the_rows_beside_it(settings: str) -> None:
    energy = SETTINGS[settings]
    model, rows, draws = build(SHAPES["grouped"], energy), rows_of(), draws_of(energy)
    together = model(rows["tokens"], rows["targets"], draws, **documents(rows)).logits
    for number in range(3):
        one = {name: each[number : number + 1] for name, each in rows.items()}
        alone = draws_of(energy)
        alone = type(alone)(
            energy, [draws.keys[number]], draws.landscapes, draws.device, spread=True
        )
        logits = model(one["tokens"], one["targets"], alone, **documents(one)).logits
        torch.testing.assert_close(logits[0], together[number], rtol=1e-9, atol=1e-9)


def alive_after_forward(energy: EnergySection, last_steps: int, checkpointing: Any = "none") -> int:
    model = build(SHAPES["grouped"], energy, torch.float32, checkpointing)
    rows, draws = rows_of(2, 32), draws_of(energy, 2, last_steps)
    with LiveTensors() as tensors:
        result = model(rows["tokens"], rows["targets"], draws, **documents(rows))
        objective = result.objective
        del result
    gc.collect()
    alive = tensors.bytes()
    assert objective.requires_grad
    return alive


CANDIDATES = 4 * 2 * 32 * VOCABULARY
"""Bytes of the candidates of a pass in the tests of memory."""


def test_a_step_more_keeps_one_more_candidate_and_nothing_else() -> None:
    for name in ("S1", "through all steps", "on logits"):
        energy = SETTINGS[name].model_copy(update={"step_size_spread": 1.0})
        alive = [alive_after_forward(energy, steps) for steps in (1, 2, 6)]
        scalars = 600
        assert alive[1] - alive[0] == pytest.approx(CANDIDATES, abs=scalars), name
        assert alive[2] - alive[1] == pytest.approx(4 * CANDIDATES, abs=4 * scalars), name


def test_truncated_steps_keep_nothing() -> None:
    alive = [alive_after_forward(SETTINGS["S2"], steps) for steps in (1, 2, 6)]
    assert alive[1] - alive[0] == pytest.approx(0, abs=600)
    assert alive[2] - alive[1] == pytest.approx(0, abs=2400)


def test_torch_s_own_derivative_keeps_a_graph_of_every_step() -> None:
    energy = SETTINGS["S1"].model_copy(update={"inner_step": "plain"})
    alive = [alive_after_forward(energy, steps) for steps in (1, 2)]
    assert alive[1] - alive[0] > 20 * CANDIDATES


@pytest.mark.parametrize(
    ("inner", "mode"), [("graph_free", "block"), ("graph_free", "selective"), ("plain", "block")]
)
def test_recomputation_changes_no_bit_of_a_gradient(inner: str, mode: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    energy = SETTINGS["through all steps"].model_copy(update={"inner_step": inner})
    for checkpointing in ("none", mode):
        model = build(SHAPES["mixed"], energy, torch.float32, checkpointing)
        rows = rows_of()
        result = model(rows["tokens"], rows["targets"], draws_of(energy), **documents(rows))
        found.append(gradients_of(model, result.objective))
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


# With torch's own derivative the graph of the inner gradient is kept, recomputed or not.
@pytest.mark.parametrize(("inner", "share"), [("graph_free", 0.6), ("plain", 0.9)])
def test_recomputation_keeps_less(inner: str, share: float) -> None:
    energy = SETTINGS["S1"].model_copy(update={"inner_step": inner})
    plain, block = (alive_after_forward(energy, 1, mode) for mode in ("none", "block"))
    assert block < share * plain


@INNER_STEPS
def test_bfloat16_has_about_the_gradient_of_float32(inner: str) -> None:
    energy = SETTINGS["S1"].model_copy(update={"inner_step": inner})
    found: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        model, rows = build(SHAPES["grouped"], energy, dtype), rows_of()
        result = model(rows["tokens"], rows["targets"], draws_of(energy), **documents(rows))
        assert result.objective.dtype == result.logits.dtype == torch.float32
        gradients = gradients_of(model, result.objective)
        found.append(torch.cat([each.float().flatten() for each in gradients.values()]))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_token_by_token_has_the_logits_of_the_whole(shape: str) -> None:
    model, tokens = build(SHAPES[shape], SETTINGS["S2"]), rows_of()["tokens"]
    whole = model.logits(tokens)
    assert whole.shape == (3, 12, VOCABULARY)
    torch.testing.assert_close(model.logits(tokens, last_only=True), whole[:, -1:])
    with torch.no_grad():
        caches = model.new_caches(3, 12)
        parts = [model.logits(tokens[:, :5], caches)]
        parts += [model.logits(tokens[:, n : n + 1], caches, last_only=True) for n in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_text_is_sampled_and_is_the_same_every_time() -> None:
    model = build(SHAPES["grouped"], SETTINGS["S1"], torch.float32)
    settings = SamplingSettings(max_tokens=8, seed=3)
    texts = [list(generate(model, [4, 5, 6], 0, settings)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_every_seed_starts_somewhere_else_and_the_step_size_where_it_is_set() -> None:
    starts: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0, 1):
        model = EnergyModel(SHAPES["plain"], SETTINGS["S1"], VOCABULARY)
        model.initialise(seed)
        starts.append({name: each.detach().clone() for name, each in model.named_parameters()})
    for name, first in starts[0].items():
        assert torch.equal(first, starts[1][name])
    assert not torch.equal(starts[0]["candidate_proj.weight"], starts[2]["candidate_proj.weight"])
    assert starts[0]["step_size"].tolist() == [5.0]
    assert not starts[0]["step_embed.weight"].any()


def test_adaln_leaves_blocks_out_at_first_and_learns_to_use_them() -> None:
    model = EnergyModel(ModelSection(layers=1), EnergySection(variant="adaln"), VOCABULARY)
    model.initialise(0)
    matrices = [each for name, each in model.named_parameters() if name.startswith("modulations")]
    assert not any(each.any() for each in matrices)
    rows = rows_of()
    model(rows["tokens"], rows["targets"], draws_of(model.energy)).objective.backward()
    assert all(each.grad is not None and each.grad.any() for each in matrices)


def test_names_of_weights_are_those_of_a_language_model_and_a_few_of_its_own() -> None:
    energy = EnergySection(variant="adaln")
    names = set(EnergyModel(ModelSection(layers=1), energy, VOCABULARY).state_dict())
    assert {"embedding.weight", "norm.weight", "layers.0.blocks.0.mixer.query.weight"} < names
    own = {name for name in names if not name.startswith(("layers", "norm", "embedding"))}
    assert own == {
        "candidate_proj.weight",
        "energy_head.weight",
        "step_embed.weight",
        "step_size",
        "modulations.0.weight",
        "modulations.1.weight",
    }
